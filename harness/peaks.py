"""Peak speeds of GPUs, for MFU."""

import math
import re

# Dense bf16 tensor-core peaks with float32 accumulation, TFLOP/s, by card (peak_flops).
# Where a data sheet says "with sparsity", half of it. Cards not found there are left out.
PEAK_TFLOPS = {
    # Data sheets; for A40 and RTX A6000 the white paper on GA102, v2, for RTX PRO that on
    # RTX Blackwell PRO, v1.1
    "A100": 312.0,
    "H100 PCIe": 756.0,  # before the bare name, which stands for the SXM module
    "H100 NVL": 835.0,
    "H100": 989.5,
    "H200 NVL": 835.0,
    "H200": 989.5,
    "GH200": 989.5,
    "B200": 2250.0,
    "B300 SXM6 AC": 2250.0,
    "GB200": 2500.0,
    "GB300": 2500.0,
    "A10": 125.0,
    "A10G": 70.0,
    "A30": 165.0,
    "A40": 149.7,
    "A800": 312.0,
    "H20": 148.0,
    "L4": 121.0,
    "L20": 119.5,
    "L40": 181.05,
    "L40S": 362.05,  # as printed; half of the 733 with sparsity is 366.5
    "RTX A4000": 76.7,
    "RTX A5000": 111.1,
    "RTX A6000": 154.8,
    "RTX 5000 Ada": 261.1,
    "RTX 6000 Ada": 364.25,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "RTX PRO 6000 Blackwell Max-Q Workstation Edition": 438.9,
    # GeForce: 4 * CUDA cores * boost clock, half of what a professional card of the chip
    # does, as in the appendices of the white papers on GA102 (RTX 3080 59.5, 3090 71),
    # AD102 (RTX 4090 165.2) and RTX Blackwell (RTX 5090 209.5); cores and clocks from
    # NVIDIA's pages of the cards.
    "RTX 3060": 25.5,
    "RTX 3060 Ti": 32.4,
    "RTX 3070": 40.6,
    "RTX 3070 Ti": 43.5,
    "RTX 3080": 59.5,  # of 10 GB; that of 12 GB has the same name and 61.3
    "RTX 3080 Ti": 68.2,
    "RTX 3090": 71.2,
    "RTX 3090 Ti": 80.0,
    "RTX 4060": 30.2,
    "RTX 4060 Ti": 44.1,
    "RTX 4070": 58.3,
    "RTX 4070 SUPER": 71.0,
    "RTX 4070 Ti": 80.2,
    "RTX 4070 Ti SUPER": 88.2,
    "RTX 4080": 97.5,
    "RTX 4080 SUPER": 104.4,
    "RTX 4090": 165.2,
    "RTX 4090 D": 147.1,
    "RTX 5050": 26.3,
    "RTX 5060": 38.4,
    "RTX 5060 Ti": 47.4,
    "RTX 5070": 61.7,
    "RTX 5070 Ti": 87.9,
    "RTX 5080": 112.6,
    "RTX 5090": 209.5,
    "RTX 5090 D": 209.5,
}


def peak_flops(gpu_name: str) -> float:
    """Return the dense bf16 peak of the GPU that torch calls `gpu_name`, in FLOP/s.

    nan if it is unknown. Behind the card's name only memory and form may follow: a
    laptop's chip, a slice of a card (MIG, vGPU) or a variant not in the table is not it.
    """
    form = r"([ -](SXM\d|PCIe|PCIE|\d+GB?|HBM3\w*|Generation))*"
    for card, tflops in PEAK_TFLOPS.items():
        if re.fullmatch(f"NVIDIA (GeForce )?{card}{form}", gpu_name):
            return tflops * 1e12
    return math.nan
