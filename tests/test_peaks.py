"""The peaks of the cards, by the names that torch gives them, and the speed over the peak."""

import math

import pytest

from harness.peaks import PEAK_TFLOPS, peak_flops

# CUDA cores, boost clock in GHz: NVIDIA's pages of the cards.
GEFORCE = {
    "RTX 3060": (3584, 1.777),
    "RTX 3060 Ti": (4864, 1.665),
    "RTX 3070": (5888, 1.725),
    "RTX 3070 Ti": (6144, 1.77),
    "RTX 3080": (8704, 1.71),
    "RTX 3080 Ti": (10240, 1.665),
    "RTX 3090": (10496, 1.695),
    "RTX 3090 Ti": (10752, 1.86),
    "RTX 4060": (3072, 2.46),
    "RTX 4060 Ti": (4352, 2.535),
    "RTX 4070": (5888, 2.475),
    "RTX 4070 SUPER": (7168, 2.475),
    "RTX 4070 Ti": (7680, 2.61),
    "RTX 4070 Ti SUPER": (8448, 2.61),
    "RTX 4080": (9728, 2.505),
    "RTX 4080 SUPER": (10240, 2.55),
    "RTX 4090": (16384, 2.52),
    "RTX 4090 D": (14592, 2.52),
    "RTX 5050": (2560, 2.57),
    "RTX 5060": (3840, 2.497),
    "RTX 5060 Ti": (4608, 2.572),
    "RTX 5070": (6144, 2.512),
    "RTX 5070 Ti": (8960, 2.452),
    "RTX 5080": (10752, 2.617),
    "RTX 5090": (21760, 2.407),
    "RTX 5090 D": (21760, 2.407),
}
# As torch.cuda.get_device_name() says it; TFLOP/s of the data sheets.
SERVERS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA A30": 165,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A40": 149.7,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA GH200 144G HBM3e": 989.5,
    "NVIDIA B200": 2250,
    "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA GB300": 2500,
    "NVIDIA H20": 148,
    "NVIDIA L20": 119.5,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA RTX A4000": 76.7,
    "NVIDIA RTX A5000": 111.1,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX 5000 Ada Generation": 261.1,
    "NVIDIA RTX 6000 Ada Generation": 364.25,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 438.9,
}
UNKNOWN = [
    "none (cpu)",
    "",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A10-24Q",
    "NVIDIA A1000",
    "NVIDIA H100 80GB HBM2e",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "NVIDIA RTX 6000D",
    "NVIDIA GeForce RTX 2080 Ti",
    "NVIDIA GeForce RTX 3050",
    "NVIDIA GeForce RTX 3060 Laptop GPU",
    "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D v2",
    "NVIDIA GeForce RTX 5070 Ti SUPER",
    "Tesla T4",
    "AMD Instinct MI300X",
]


@pytest.mark.parametrize("card", GEFORCE)
def test_a_geforce_card_does_four_flops_a_core_and_cycle(card):
    cores, gigahertz = GEFORCE[card]
    peak = peak_flops(f"NVIDIA GeForce {card}")
    assert peak == pytest.approx(4 * cores * gigahertz * 1e9, rel=0.003)
    assert math.isnan(peak_flops(f"NVIDIA GeForce {card} Laptop GPU"))


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_card_has_the_peak_of_its_data_sheet(name):
    assert peak_flops(name) == pytest.approx(SERVERS[name] * 1e12)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_card_that_is_not_in_the_table_has_no_peak(name):
    assert math.isnan(peak_flops(name))


def test_every_card_of_the_table_is_tested():
    tested = {f"NVIDIA GeForce {card}" for card in GEFORCE} | set(SERVERS)
    assert len({peak_flops(name) for name in tested}) == len({*PEAK_TFLOPS.values()})
    for card in PEAK_TFLOPS:
        assert any(card in name for name in tested), card


# White papers: GA102 (RTX 3080, 3090, A6000), Ada (RTX 4090), RTX Blackwell (the others).
@pytest.mark.parametrize(
    "card, tflops",
    [("3080", 59.5), ("3090", 71), ("4090", 165.2), ("5070", 61.7), ("5080", 112.6)]
    + [("5070 Ti", 87.9), ("5090", 209.5)],
)
def test_the_figures_that_the_white_papers_print(card, tflops):
    peak = peak_flops(f"NVIDIA GeForce RTX {card}")
    assert peak == pytest.approx(tflops * 1e12, rel=0.003)
