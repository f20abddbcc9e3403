"""analysis.py: the night's arithmetic by hand, and a page with a sentence for every log."""

import base64
import math
import os
import re
import subprocess
from statistics import stdev

import numpy as np
import pytest

from cells import HEADER, ROOT

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.font_manager import findfont, get_font  # noqa: E402

import analysis  # noqa: E402  (needs the group analysis)
from analysis import analyse, expected_best, write_report  # noqa: E402
from loop.verdict import noise_of, without_accidents  # noqa: E402
from morning import page, picture  # noqa: E402
from morning.page import headline, student, write_page  # noqa: E402
from morning.parts import parts  # noqa: E402
from morning.picture import DARK, draw_night  # noqa: E402

# commit, val_bpb, status, what ends the line
NIGHT = [
    ("0000000", 0.9980, "keep", "baseline, seed 42, 2000 steps, 1.000 M tok/s"),
    ("0000000", 0.9990, "keep", "baseline, seed 43, 2000 steps, 1.000 M tok/s"),
    ("0000000", 0.9970, "keep", "baseline, seed 44, 2000 steps, 1.000 M tok/s"),
    ("1111111", 0.9940, "keep", "wider MLP, seed 42, 1900 steps, 0.950 M tok/s"),
    ("2222222", 0.9932, "discard", "softcap 20, seed 42, 1900 steps, 0.950 M tok/s"),
    ("33333e3", 0.0, "crash", "fp8 head, seed 42"),
    ("4444444", 0.9935, "discard", "fewer lines, seed 42, 1900 steps, 0.950 M tok/s"),
    ("4444444", 0.9949, "keep", "fewer lines, seed 43, 1900 steps, 0.950 M tok/s"),
    ("5555555", 0.0, "crash", "depth 10, seed 42, void: gpu"),
    (
        "6666666",
        0.9000,
        "discard",
        "leak, seed 42, 1900 steps, 0.950 M tok/s, void: leaks",
    ),
    ("7777777", 0.9880, "keep", "rates x 1.5, seed 42, 1900 steps, 0.950 M tok/s"),
    ("1111111", 0.9950, "keep", "wider MLP, seed 43, 1886 steps, 0.943 M tok/s"),
]


def log(lines) -> str:
    """Return the text of a log with these lines; commit, val_bpb, status, description."""
    form = "{}\t{:.6f}\t58.7\t{}\t{}\n"
    return HEADER + "".join(form.format(*line) for line in lines)


@pytest.fixture
def quick(monkeypatch):
    """Pictures are drawn, but not turned into files."""
    for module in (analysis, page):
        monkeypatch.setattr(module, "png", lambda figure: b"\x89PNG")


def words(text: str) -> str:
    """Return what a reader of a page sees."""
    return " ".join(re.sub("<style>.*?</style>|<[^>]*>", " ", text, flags=re.S).split())


# ---- By hand ---------------------------------------------------------------------------
def test_a_night_counted_by_hand():
    night = analyse(log(NIGHT))
    # Pooled: baseline 2 e-6 with 2 degrees, 0.5 e-6 and 0.98 e-6 with one each.
    assert night.noise == pytest.approx(math.sqrt((2 + 0.5 + 0.98) * 1e-6 / 4))
    assert night.spare == 4
    numbers = {c.commit: (c.number, c.status, len(c.values)) for c in night.every}
    assert numbers == {
        "0000000": (0, "keep", 3),
        "1111111": (1, "keep", 2),
        "2222222": (2, "discard", 1),
        "33333e3": (3, "crash", 0),
        "4444444": (4, "keep", 2),
        "5555555": (5, "crash", 0),
        "6666666": (6, "withdrawn", 1),
        "7777777": (7, "keep", 1),
    }
    gains = {c.number: c.gain for c in night.changes if c.number and c.values}
    # 1 has the mean 0.9945, 4 has 0.9942; each against the best mean before it.
    expected = {1: 0.0035, 2: 0.0013, 4: 0.0003, 7: 0.0062}
    assert gains == pytest.approx(expected)
    assert night.changes[1].error == pytest.approx(night.noise * math.sqrt(1 / 2 + 1 / 3))
    assert [c.believe for c in night.tried("keep")] == ["stands", "no gain", "stands"]
    assert (
        headline(night)
        == "0.9980 \u2192 0.9880, 7 experiments, 3 kept, 1 left out, noise 0.0009"
    )
    assert night.luck == pytest.approx(night.noise * expected_best(4))


def test_gains_of_a_chain_add_up_to_the_whole():
    night = analyse(log(NIGHT))
    whole = night.start.mean - night.best.mean
    assert sum(max(0, c.gain) for c in night.tried("keep")) == pytest.approx(whole)


def test_a_simpler_change_does_not_lower_the_bar_for_the_next():
    lines = [("aaaaaa0", 0.990, "keep", "baseline, seed 42")]
    lines += [("aaaaaa1", 0.991, "keep", "shorter, seed 42")]
    lines += [("aaaaaa2", 0.9895, "keep", "next, seed 42")]
    gains = [c.gain for c in analyse(log(lines)).tried("keep")]
    assert gains == pytest.approx([-0.001, 0.0005])  # not 0.0015
    assert analyse(log(lines[:2])).best.commit == "aaaaaa0"


def test_drift_shows_in_the_control_and_in_the_steps():
    night = analyse(log(NIGHT))
    ((run, at, moved),) = night.controls
    assert (run.commit, at) == ("1111111", 7)
    assert moved == pytest.approx(0.943 / 0.950 - 1)
    assert "ran again. Speed was within 0.7% of the commit's first run." in (
        page.drift_words(night)
    )
    steps, bpb, _ = night.drift()
    half = math.log(1900 / 1886) / 2
    assert (min(steps), max(steps)) == pytest.approx((-half, half))
    assert len(bpb) == 7 and sum(bpb) == pytest.approx(0)


def test_where_the_machine_changed_gains_are_of_one_speed():
    end = "seed 4{}, {} steps, {} M tok/s"
    fast, slow = (2000, "1.000"), (1900, "0.950")
    lines = [("aaaaaa0", 0.9980, "keep", "baseline, " + end.format(2, *fast))]
    lines += [("aaaaaa1", 0.9950, "keep", "wider, " + end.format(2, *fast))]
    lines += [("aaaaaa2", 0.9990, "discard", "deeper, " + end.format(2, *fast))]
    for seed in (3, 4):  # a control, and once more
        lines += [("aaaaaa1", 0.9970, "keep", "wider, " + end.format(seed, *slow))]
    lines += [("aaaaaa3", 0.9955, "keep", "rates, " + end.format(2, *slow))]
    lines += [("aaaaaa0", 1.0001, "keep", "baseline, " + end.format(3, *slow))]  # control
    night = analyse(log(lines))
    gains = [c.gain for c in night.changes]
    assert gains[1:] == pytest.approx([0.0031, -0.0040, 0.0015])  # 0.0015, not -0.0005
    assert night.spare == 1  # two runs at two speeds are no repeat, those at one are
    assert night.best.commit == "aaaaaa3"
    assert night.gain == pytest.approx(1.0001 - 0.9955)
    text = page.drift_words(night)
    assert "<b>2 changed speed by over 2%</b> (-5.0% at experiment 2, -5.0% at" in text
    assert "1 % more steps went with -0.0004 (r = -1.00)" in text


def test_a_run_on_a_busy_host_is_left_out_of_mean_noise_and_gain(quick):
    end = "seed 4{}, {} steps, {} M tok/s"
    lines = [
        (*line[:3], "baseline, " + end.format(k, 1719, 3.759))
        for k, line in enumerate(BASE)
    ]
    clean = analyse(log(lines)).changes[0]
    lines += [("aaaaaa9", 1.1, "discard", "worse, " + end.format(2, 1719, 3.759))]
    slow = [("aaaaaa0", 1.0030, "keep", "baseline, " + end.format(5, 1581, 3.459))]
    after = [("aaaaaa1", 0.9950, "keep", "wider, " + end.format(2, 1700, 3.717))]
    night = analyse(log([*lines, *slow, *after]))
    base, _, wider = night.changes
    assert (base.mean, base.noise) == (clean.mean, clean.noise)
    assert wider.gain == pytest.approx(clean.mean - 0.9950)
    text = words(page.believe(night)) + words(
        page.everything(night) + page.best_commit(night)
    )
    assert "1 run had a speed that did not come again: left out" in text
    assert "6 runs: 5 counted, 1 at a speed that did not come again" in text


def test_repeats_before_a_verdict_are_no_controls():
    lines = NIGHT[:4] + [NIGHT[3]]
    assert analyse(log(lines)).controls == []
    # Nor does what another GPU does in between make one.
    lines = [("aaaaaa0", 0.99, "keep", "baseline, seed 42, gpu 0")]
    lines += [("aaaaaa1", 0.98, "keep", "wider, seed 42, gpu 0")]
    lines += [("aaaaaa2", 0.99, "discard", "deeper, seed 42, gpu 1")]
    lines += [("aaaaaa1", 0.98, "keep", "wider, seed 43, gpu 0")]
    assert analyse(log(lines)).controls == []


def test_expected_best_of_n_draws():
    assert expected_best(0) == expected_best(1) == 0
    # Tables of normal order statistics.
    assert expected_best(10) == pytest.approx(1.5388, rel=0.01)
    assert expected_best(100) == pytest.approx(2.5076, rel=0.01)


def test_the_noise_has_a_floor_while_it_rests_on_three_runs():
    lines = [
        ("aaaaaa0", 0.99 + i * 1e-5, "keep", f"baseline, seed {i}") for i in range(3)
    ]
    assert analyse(log(lines)).noise == 0.0005
    more = lines + [("aaaaaa0", 0.99001, "keep", "baseline, seed 3")]
    assert analyse(log(more)).noise < 0.0001


def test_each_gpu_is_compared_with_itself():
    lines = [("aaaaaa0", 0.990, "keep", f"baseline, seed {s}, gpu 0") for s in (42, 43)]
    lines += [("aaaaaa0", 0.980, "keep", f"baseline, seed {s}, gpu 1") for s in (42, 43)]
    lines += [("aaaaaa1", 0.985, "keep", "wider, seed 42, gpu 0")]
    lines += [("aaaaaa2", 0.985, "discard", "deeper, seed 42, gpu 1")]
    lines += [("aaaaaa1", 0.976, "keep", "wider, seed 42, gpu 1")]  # offered to the other
    night = analyse(log(lines))
    changes = [(c.gpu, c.number, round(c.gain, 6)) for c in night.changes if c.number]
    assert changes == [("0", 1, 0.005), ("1", 2, -0.005), ("1", 1, 0.004)]
    said = "0.9800 \u2192 0.9760 on GPU 1, noise 0.0005; all GPUs: 2 experiments, 1 kept"
    assert headline(night) == said
    figure = analysis.picture(night)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    band = "best so far, and one noise (0.0005) around it"
    assert shown[:2] == [f"GPU 0, {band}", f"GPU 1, {band}"]
    assert shown.count("kept") == shown.count("discarded") == 1


def test_what_one_gpu_withdrew_is_not_gone_from_another():
    lines = [("aaaaaa0", 0.990, "keep", f"baseline, seed 42, gpu {gpu}") for gpu in "01"]
    lines += [("aaaaaa1", 0.980, "discard", "wider, seed 42, gpu 0, void: leaks")]
    lines += [("aaaaaa1", 0.980, "keep", "wider, seed 42, gpu 1")]  # in the same second
    night = analyse(log(lines))
    assert [(c.gpu, c.idea) for c in night.tried("keep")] == [("1", "wider")]
    assert [c.gpu for c in night.every if c.gone] == ["0"]


def test_a_joined_logs_second_baseline_is_no_experiment():
    lines = [("aaaaaa0", 0.990, "keep", f"baseline, seed {s}, gpu 0") for s in (42, 43)]
    lines += [("aaaaaa1", 0.980, "keep", "wider, seed 42, gpu 0")]
    lines += [("aaaaaa1", 0.985, "keep", f"baseline, seed {s}, gpu b") for s in (42, 43)]
    lines += [("aaaaaa2", 0.988, "discard", "deeper, seed 42, gpu b")]
    night = analyse(log(lines))  # the second machine began with what the first had kept
    assert [(c.gpu, c.number) for c in night.changes] == [
        ("0", 0),
        ("0", 1),
        ("b", 0),
        ("b", 2),
    ]
    end = " on GPU 0, noise 0.0005; all GPUs: 2 experiments, 1 kept"
    assert headline(night).endswith(end)


def test_the_legend_of_four_gpus_fits_the_picture():
    lines = []
    for gpu in "0123":
        lines += [
            ("aaaaaa0", 0.99, "keep", f"baseline, seed {s}, gpu {gpu}") for s in "23"
        ]
        lines += [(f"aaaaab{gpu}", 0.98, "keep", f"wider, seed 42, gpu {gpu}")]
        lines += [(f"aaaaac{gpu}", 0.985, "discard", f"deeper, seed 42, gpu {gpu}")]
        lines += [(f"aaaaad{gpu}", 1.1, "discard", f"far off, seed 42, gpu {gpu}")]
        lines += [(f"aaaaae{gpu}", 0, "crash", f"fp8, seed 42, gpu {gpu}")]
        lines += [(f"aaaaab{gpu}", 0.98, "keep", f"wider, seed 43, gpu {gpu}")]
    figure = analysis.picture(analyse(log(lines)))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("count", [1, 5, 6, 8])
def test_the_legend_of_many_gpus_fits_the_picture(count):
    lines = []
    for gpu in range(count):
        lines += [
            ("aaaaaa0", 0.99, "keep", f"baseline, seed {s}, gpu {gpu}") for s in "23"
        ]
        lines += [(f"aaaaab{gpu}", 0.98, "keep", f"wider, seed 42, gpu {gpu}")]
    figure = analysis.picture(analyse(log(lines)))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1


def test_a_noisy_gpu_does_not_hide_what_the_other_gained(quick):
    quiet, loud = (0.9900, 0.9901, 0.9902, 0.9903), (0.990, 0.994, 0.998, 1.002)
    ends = {"0": quiet, "1": loud}
    lines = [
        ("aaaaaa0", value, "keep", f"baseline, seed {seed}, gpu {gpu}")
        for gpu, values in ends.items()
        for seed, value in enumerate(values)
    ]
    lines += [("aaaaaa1", 0.98885, "keep", "wider, seed 42, gpu 0")]
    lines += [("aaaaaa2", 0.9900, "keep", "deeper, seed 42, gpu 1")]
    lines += [("aaaaaa3", 0.9910, "discard", "softcap 20, seed 42, gpu 0")]
    night = analyse(log(lines))
    noises = {gpu: noise for gpu, (noise, _) in night.noises.items()}
    assert noises == pytest.approx({gpu: stdev(values) for gpu, values in ends.items()})
    assert {c.idea: c.believe for c in night.tried("keep")} == {
        "wider": "stands",  # 10 times the noise of its GPU
        "deeper": "may be luck",  # a gain of 0.006, but 1.2 times the noise of its GPU
    }
    assert night.luck == pytest.approx(noises["0"] * expected_best(2))
    text = words(write_page(night))
    assert "on GPU 0, noise 0.0001; all GPUs: 3 experiments, 2 kept" in text
    assert "The noise on GPU 0 is 0.0001. The noise on GPU 1 is 0.0052." in text
    assert "+0.0060 +1.2" in text and "The whole gain on GPU 0 is 0.0013" in text
    shown = [t.get_text() for t in draw_night(night).legends[0].get_texts()]
    for gpu, noise in noises.items():
        assert f"GPU {gpu}, best so far, and one noise ({noise:.4f}) around it" in shown


def test_logs_joined_by_the_recipe_do_not_mix_two_machines(tmp_path, quick):
    """The command of docs/recipes.md; `ssh` runs what it is told in a folder of this machine."""
    recipes = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    join = recipes[recipes.index("name() {") :].partition("\nuv run")[0]
    join = re.sub("\ngit fetch .*", "", join)
    lines = [("aaaaaa0", 0.990, "keep", f"baseline, seed {s}") for s in (42, 43)]
    (tmp_path / "results.tsv").write_text(log(lines))
    lines = [(*line[:3], f"{line[3]}, gpu 0") for line in lines]
    lines += [("aaaaaa0", 0.980, "keep", f"baseline, seed {s}, gpu 1") for s in (42, 43)]
    end = "both, seed 43 first, seed 42, gpu 1, 2000 steps, 1.000 M tok/s"
    lines += [("aaaaaa1", 0.9790, "keep", end)]
    lines += [("aaaaaa2", 0.9000, "discard", "leak, seed 42, gpu 0, void: a, seed 4")]
    (tmp_path / "autoresearch").mkdir()
    (tmp_path / "autoresearch" / "results.tsv").write_text(log(lines))
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", join], cwd=tmp_path, env=env, check=True)
    text = (tmp_path / "results-all.tsv").read_text()
    assert text.count("commit\t") == 1 and len(text.splitlines()) == 9
    night = analyse(text)
    changes = [(c.gpu, c.number, c.idea, c.mean) for c in night.changes]
    assert changes == [
        ("a", 0, "baseline", 0.990),
        ("b0", 0, "baseline", 0.990),
        ("b1", 0, "baseline", 0.980),
        ("b1", 1, "both, seed 43 first", 0.979),
    ]
    assert night.gain == pytest.approx(0.001)
    assert [(c.idea, c.gpu) for c in night.every if c.gone] == [("leak", "b0")]
    assert "The noise on GPU a is " in words(write_page(night))


def test_a_crash_that_was_mended_is_one_experiment():
    lines = [*NIGHT[:3], ("aaaaaa1", 0, "crash", "wider, seed 42")]
    lines += [("aaaaaa2", 0.99, "keep", "wider, seed 42")]
    lines += [("aaaaaa3", 0.98, "keep", "wider, seed 42")]  # the same words, another idea
    night = analyse(log(lines))
    assert [c.number for c in night.changes] == [0, 1, 1, 2]
    assert "2 experiments, 2 kept" in headline(night)
    assert "Never measured" not in page.try_next(night)


# ---- Faults that were met --------------------------------------------------------------
def test_what_a_line_is_follows_from_its_commit_not_from_its_words():
    lines = [("aaaaaa0", 0.990, "keep", f"baseline, seed {s}") for s in (42, 43, 44, 45)]
    lines += [("aaaaaa1", 1.036, "discard", "baseline lr doubled, seed 42")]
    lines += [("aaaaaa2", 0.985, "keep", "seed 43 for the tables, not 42, seed 42")]
    night = analyse(log(lines))
    assert (night.noise, night.spare) == (0, 3)  # a fourth baseline run is no experiment
    assert [c.idea for c in night.changes if c.number] == [
        "baseline lr doubled",
        "seed 43 for the tables, not 42",
    ]


def test_a_noise_of_zero_is_no_error(quick):
    lines = [("aaaaaa0", 0.990, "keep", f"baseline, seed {s}") for s in (42, 43, 44, 45)]
    lines += [("aaaaaa1", 0.985, "keep", "wider, seed 42")]
    night = analyse(log(lines))
    assert [c.believe for c in night.tried("keep")] == ["stands"]
    assert "noise 0.0000" in write_page(night)


@pytest.mark.parametrize("value", ["nan", "n/a", "inf", "-1", "", "0"])
def test_a_value_that_is_no_number_counts_as_nothing(value):
    line = f"aaaaaa1\t{value}\t58.7\tkeep\twider, seed 42\n"
    night = analyse(log(NIGHT[:3]) + line)
    assert [c.status for c in night.changes] == ["keep", "crash"]


def test_older_logs_read_the_same(quick):
    lines = [("aaaaaa0", 0.44, "keep", "baseline, seed 42, rules full-0a1b2c3d")]
    lines += [("aaaaaa0", 0.45, "keep", "baseline")]
    lines += [("aaaaaa1", 0.0, "crash", "depth 10, seed 42, void")]
    lines += [("aaaaaa1", 0.42, "keep", "depth 10")]
    lines += [("aaaaaa2", 0.0, "crash", "avoid, or fill, the void")]
    night = analyse(log(lines))
    assert headline(night).startswith("0.4450 \u2192 0.4200, 2 experiments, 1 kept")
    text = words(write_page(night))
    assert "1 crashed, 1 void." in text
    assert "drift would not show" in text.lower()


def test_on_a_machine_whose_speed_doubled_the_page_says_what_more_steps_are_worth():
    """Under the smoke rules the log has steps and no speed; they were all of a real gain."""
    runs = [(42, 2.48, 22), (43, 2.45, 24), (44, 2.53, 21)]
    lines = [
        ("aaaaaa0", bpb, "keep", f"baseline, seed {s}, {n} steps under the smoke rules")
        for s, bpb, n in runs
    ]
    for seed, bpb, steps in [(42, 2.38, 26), (43, 2.11, 47)]:
        end = f"seed {seed}, {steps} steps under the smoke rules"
        lines.append(("aaaaaa1", bpb, "keep", f"Muon at twice the rate, {end}"))
    text = page.drift_words(analyse(log(lines)))
    assert "1 % more steps went with -0.004" in text and "compare the steps" in text


def test_a_discard_that_the_whole_nights_noise_puts_above_the_bar_is_worth_another_run():
    base = [("aaaaaaa", 1.0, "keep", f"baseline, seed {seed}") for seed in (42, 43)]
    tried = ("bbbbbbb", 0.9980, "discard", "a skip, seed 42")
    then = ("ccccccc", 0.9970, "keep", "rates, seed 42")
    night = analyse(log([*base, tried, then]))
    assert night.tried("discard")[0].times > 1.5
    assert "a skip" in words(page.try_next(night))


def test_a_log_that_was_torn_edited_and_written_on_windows():
    text = log(NIGHT[:4]).replace("\n", "\r\n").rstrip("\r\n")
    assert headline(analyse(text)) == headline(analyse(log(NIGHT[:4])))
    torn = analyse(text + "\r\n2222222\t0.99\nnote to self\n\n")
    assert len(torn.strays) == 2 and len(torn.changes) == 2
    odd = [("12e4567", 0.99, "keep", 'an "open quote'), ("0000001", 0.98, "keep", "NA")]
    night = analyse("\ufeff" + log(odd))
    assert [(c.commit, c.idea) for c in night.changes] == [
        ("12e4567", 'an "open quote'),
        ("0000001", "NA"),
    ]


# ---- The page --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "No result yet As of"),
        ("", "No result yet As of"),
        (HEADER.rstrip("\n"), "Nothing has been measured yet."),
        (log([("aaaaaa0", 0, "crash", "baseline, seed 42")]), "1 crashed"),
        (log(NIGHT[:1]), "0.9980, the baseline alone, noise 0.0005 (assumed)"),
        (log(NIGHT[:3]), "0.9980, the baseline alone, noise 0.0010"),
        (log([NIGHT[5], NIGHT[3]]), "0.9940 \u2192 0.9940, 1 experiment, 1 kept"),
        (log([*NIGHT[:3], NIGHT[4]]), "1 experiment, 0 kept"),
        ("no tabs at all\n", "Lines of the log that are no runs: 1"),
    ],
)
def test_every_log_gives_a_page_with_a_sentence(tmp_path, quick, text, sentence):
    if text is not None:
        (tmp_path / "results.tsv").write_text(text, encoding="utf-8")
    assert sentence in words(write_report(tmp_path).read_text("utf-8"))


def test_words_of_the_log_are_text_not_html(quick):
    idea = '<script>alert("&")</script> $x_{'
    lines = [*NIGHT[:3], ("<b>aaaa", 0.99, "keep", idea), ("aaaaaa9", 0, "crash", idea)]
    text = write_page(analyse(log(lines) + "<i>stray\n"))
    assert (
        "&lt;script&gt;" in text and "&lt;i&gt;stray" in text and "&lt;b&gt;aaaa" in text
    )
    assert not re.search("<script|<i>|<b>aaaa", text)


def test_odd_descriptions_are_drawn_without_a_word(quick, recwarn):
    odd = [
        "\u6df1 \U0001f680",
        "a" * 200,
        "",
        "\x01 \u2028",
        "$x_{",
        "--help",
        "tab\tin it",
    ]
    lines = [*NIGHT[:3]]
    lines += [
        (f"aaaaa{i:02d}", 0.99 - i / 999, "keep", idea) for i, idea in enumerate(odd)
    ]
    night = analyse(log(lines))
    assert len(night.tried("keep")) == len(odd) and not night.strays
    assert write_page(night) and not recwarn.list


def test_without_a_log_the_notebook_shows_an_example_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    night = analysis.read_example()
    assert "This is an example" in night.note
    assert headline(night).startswith("60 s per run: ")
    (tmp_path / "results.tsv").write_text(log(NIGHT), encoding="utf-8")
    night = analysis.read_example()
    assert "example" not in night.note and headline(night)[0].isdigit()


def test_what_void_took_back_is_no_experiment_and_was_measured(quick):
    lines = [("aaaaaa0", 0.990, "keep", f"baseline, seed {n}") for n in (42, 43)]
    lines += [("aaaaaa1", 0.0, "crash", "rates, seed 42")]  # and mended:
    lines += [("aaaaaa2", 0.980, "discard", "rates, seed 42, void: leaks")]
    lines += [("aaaaaa3", 0.978, "discard", "wider, seed 42, void: leaks")]
    lines += [("aaaaaa4", 0.991, "keep", "without aaaaaa21, seed 42")]
    lines += [("aaaaaa5", 0.970, "discard", "deeper, seed 42")]
    night = analyse(log(lines))
    assert headline(night).startswith("0.9900 \u2192 0.9900, 3 experiments, 0 kept")
    text = words(write_page(night))
    assert "Never measured" not in text and "git diff" not in text
    assert "aaaaaa3, wider: leaks" in text
    low, _ = draw_night(night).axes[0].get_ylim()
    assert low < 0.970  # the discarded point below the best is in the picture


def test_the_counts_of_the_page_meet_and_what_is_left_out_is_said(quick):
    leak = "66666666"
    lines = [(leak, *x[1:]) if x[0] == "6666666" else x for x in NIGHT]
    end = f"on it, seed 42, void: stood on {leak}"
    lines += [("88888888", 0.98, "discard", end)]
    lines += [("99999999", 0.99, "keep", f"without {leak}, seed 42")]
    lines += [("aaaaaaaa", 0.99, "discard", "softcap 30, seed 42")]
    night = analyse(log(lines))
    text = write_page(night)
    assert ", 9 experiments, 3 kept, 2 left out, noise" in headline(night)
    counts = (
        "9 experiments: 3 kept, 2 discarded, 2 without a number, 1 withdrawn as broken, "
    )
    counts += (
        "1 made on top of what was withdrawn. 15 runs: 11 counted, 1 crashed, 1 void, "
    )
    assert counts + "2 left out with what was withdrawn." in words(text)
    rows = text.split("Every experiment</h2>")[1].split("</table>")[0].split("<tr>")[2:]
    cells = [row.split("<td>")[1:] for row in rows]
    assert [row[0] for row in cells] == [*"012345678", "", "9"]  # a revert has no number
    assert sum(int(row[3]) for row in cells) == 15 - 2  # a crash and a void run
    assert (
        cells[6][-1] == "withdrawn"
        and cells[8][-1] == f"made on top of {leak}, withdrawn"
    )


BASE = [("aaaaaa0", x, "keep", "baseline, seed 42") for x in (0.9980, 0.9986, 0.9975)]


def test_a_second_run_that_diverged_does_not_hide_what_was_gained(quick):
    lines = [("aaaaaa1", x, "discard", "unstable, seed 42") for x in (0.9965, 3.2)]
    lines += [("aaaaaa2", 0.9950, "keep", "good, seed 42")]
    night = analyse(log(BASE + lines))
    assert night.noise == pytest.approx(stdev(line[1] for line in BASE))
    assert [c.believe for c in night.tried("keep")] == ["stands"]


def test_gains_over_a_change_of_speed_add_up_and_nothing_is_compared_across_it(quick):
    fast, slow = (
        "seed 42, 2000 steps, 1.000 M tok/s",
        "seed 42, 1850 steps, 0.925 M tok/s",
    )
    lines = [(*line[:3], f"baseline, {fast}") for line in BASE]
    lines += [("aaaaaa1", 0.9950, "keep", f"wider, {fast}")]
    lines += [("aaaaaa2", 0.9960, "discard", f"deeper, {fast}")]
    lines += [("aaaaaa1", x, "keep", f"wider, {slow}") for x in (0.9984, 0.9986)]
    lines += [("aaaaaa3", x, "keep", f"rates, {slow}") for x in (0.9965, 0.9966)]
    night = analyse(log(lines))
    assert night.gain == pytest.approx(sum(c.gain for c in night.tried("keep")))
    text = words(write_page(night))
    assert "0.9980 \u2192 0.9966 at another speed" in text
    assert "below today's best" not in text


def test_of_two_speeds_a_gain_is_between_those_runs_that_are_most(quick):
    fast, slow = "2000 steps, 1.000 M tok/s", "1850 steps, 0.925 M tok/s"
    lines = [("aaaaaa0", x, "keep", f"baseline, seed 42, {fast}") for x in (0.998, 0.999)]
    lines += [("aaaaaa1", 0.997, "keep", f"wider, seed 42, {fast}")]
    slower = [("aaaaaa0", x, "keep", f"baseline, seed 42, {slow}") for x in (1.0, 1.001)]
    lines += slower[:1] + [("aaaaaa1", 0.996, "keep", f"wider, seed 42, {slow}")] * 2
    night = analyse(log(lines + slower[1:]))
    assert [c.gain for c in night.tried("keep")] == pytest.approx([1.0005 - 0.996])


def test_what_is_no_part_of_the_noise_does_not_lower_the_bar(quick):
    wild = [("aaaaaa1", x, "discard", "unstable, seed 42") for x in (0.9965, 3.2)]
    good = [("aaaaaa2", 0.9950, "keep", "good, seed 42")]
    bars = [analyse(log(BASE + x + good)).tried("keep")[0].stands for x in ([], wild)]
    assert bars == [student(2)] * 2


def test_the_noise_of_the_page_is_that_of_the_verdict_however_wild_the_night(quick):
    """Repeats of three sizes: what is left out must be left out once, not again."""
    spreads = [1e-4, 2e-4, 3e-4, 0.0120, 0.0124, 1.0, 1.2]
    pairs = [[0.99, 0.99 + spread] for spread in spreads]
    lines = [
        (f"aaaaaa{i}", x, "keep", f"idea {i}, seed 42")
        for i, pair in enumerate(pairs)
        for x in pair
    ]
    assert noise_of(pairs) != noise_of(without_accidents(pairs))
    assert analyse(log(lines)).noises[""][0] == noise_of(pairs)


def test_each_label_of_the_example_is_nearer_to_its_own_point_than_to_another():
    night = analyse((ROOT / "docs" / "example.tsv").read_text("utf-8"))
    ax = draw_night(night).axes[0]
    points = {str(c.number): (c.number, c.mean) for c in night.tried("keep")}
    places = dict(zip(points, ax.transData.transform([*points.values()]), strict=True))
    astray = 0
    for text in ax.texts:
        box, number = text.get_window_extent(), text.get_text().split()[0]
        ends = np.clip([*places.values()], box.min, box.max) - [*places.values()]
        gaps = dict(zip(places, np.hypot(*ends.T), strict=True))
        astray += min(gaps, key=gaps.get) != number
    assert len(ax.texts) == len(points) and astray <= len(points) // 4


def test_a_letter_that_the_font_does_not_have_is_drawn_in_one_that_does():
    letter = "\u1d15"  # of a font that comes with matplotlib
    lines = [("aaaaaa1", 0.9, "keep", f"an {letter}, seed 42")]
    texts = draw_night(analyse(log(BASE + lines))).axes[0].texts
    fonts = [
        get_font(findfont(name)).get_charmap() for name in texts[-1].get_fontfamily()
    ]
    assert letter in texts[-1].get_text() and ord(letter) not in fonts[0]
    assert any(ord(letter) in font for font in fonts[1:])


def test_no_more_fonts_are_opened_than_the_letters_need(monkeypatch):
    """Some machines have thousands."""
    opened, get = [], picture.get_font
    monkeypatch.setattr(picture, "get_font", lambda x: opened.append(x) or get(x))
    picture.find_fonts("\u1d15")
    assert opened[-1] != picture.fontManager.ttflist[-1].fname


def test_an_attempt_that_is_being_repeated_is_not_called_discarded(quick):
    lines = [("aaaaaa1", 0.9967, "discard", "wider MLP, seed 42")]
    text = words(write_page(analyse(log(BASE + lines), going={("", "aaaaaa1")})))
    assert "1 experiment: 1 going on" in text and "below today's best" not in text
    text = words(write_page(analyse(log(BASE + lines))))
    assert "1 experiment: 1 discarded" in text and "below today's best" in text


def test_a_keep_for_being_simpler_is_where_the_branch_is(quick):
    lines = [("aaaaaa1", 0.9930, "keep", "wider, seed 42")]
    text = words(write_page(analyse(log(BASE + lines))))
    assert "The branch is at" not in text
    lines += [("aaaaaa2", 0.9933, "keep", "fewer lines, seed 42")]
    text = words(write_page(analyse(log(BASE + lines))))
    assert (
        "The branch is at aaaaaa2, fewer lines, which was kept after it: 0.99330" in text
    )


@pytest.mark.parametrize("freedom", [2, 3, 5, 10, 40])
def test_a_bar_of_few_degrees_of_freedom_is_passed_by_luck_once_in_twenty(freedom):
    generator = np.random.default_rng(0)
    gains = generator.standard_normal(200_000)
    noise = np.sqrt(generator.chisquare(freedom, gains.shape) / freedom)
    assert np.mean(abs(gains / noise) > student(freedom)) == pytest.approx(0.05, abs=2e-3)


def test_three_runs_that_agree_by_chance_are_no_law_of_steps():
    shown, generator = 0, np.random.default_rng(0)
    for _ in range(200):
        bpb, steps = generator.normal(0.99, 7e-4, 3), generator.normal(2000, 6, 3)
        lines = [
            ("aaaaaa0", x, "keep", f"baseline, seed 42, {n:.0f} steps")
            for x, n in zip(bpb, steps, strict=True)
        ]
        shown += "more steps went with" in page.drift_words(analyse(log(lines)))
    assert shown < 50  # 170 without regard to how few they are


def test_the_page_says_what_to_try(quick):
    text = words(write_page(analyse(log(NIGHT))))
    assert "Near misses" in text and "2 softcap 20 (gain +0.0013, +1.4 noises)" in text
    assert "Never measured, because every run crashed or was void. 3 fp8 head" in text
    assert "leak" not in text.split("Every experiment")[0]
    assert "6666666, leak: leaks" in text.split("Withdrawn")[1]
    assert "of 3 kept changes gained more than 2.8 times the standard error. " in text
    assert not re.search("[{}]|nan", text)


@pytest.mark.parametrize("kept", [(), (0.98,), (0.9897,), (0.9893,), (0.98, 0.9797)])
def test_the_page_has_no_clause_of_nothing_and_no_plural_of_one(quick, kept):
    base = [("aaaaaa0", 0.99, "keep", f"baseline, seed {n}") for n in (42, 43, 44)]
    lines = [(f"bbbbbb{i}", x, "keep", f"b {i}, seed 42") for i, x in enumerate(kept)]
    for night in ([], base[:1] + lines, base + lines):
        text = write_page(analyse(log(night))).replace(", 0 kept,", "")
        said = words(re.sub("<table>.*?</table>", "", text))
        assert not re.search(r"(?<![\w.+-])(0 [a-z]+|1 (?!was)\w+s)\b", said)
    assert ("No kept change gained more" in said) == (kept in ((0.9897,), (0.9893,)))


def test_near_misses_gained_half_a_noise_or_more_without_a_keep():
    lines = [("aaaaaa0", 0.99, "discard", f"baseline, seed {i}") for i in (42, 43, 44)]
    for i, gain in enumerate((0.0002, 0.0003, 0.0007, 0.0008)):  # the noise is 0.0005
        lines.append((f"aaaaab{i}", 0.99 - gain, "discard", f"idea {i}, seed 42"))
    lines += [("aaaaaa1", 0.98, "keep", "wider, seed 42")]
    text = words(page.try_next(analyse(log(lines))))
    assert re.findall(r"\d idea \d", text) == ["4 idea 3", "3 idea 2", "2 idea 1"]
    assert "Near misses" in text and "below" not in text


def test_the_report_is_one_file_and_touches_nothing_that_git_tracks(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    (tmp_path / "elsewhere.tsv").write_text(log(NIGHT), encoding="utf-8")
    path = write_report(tmp_path, tmp_path / "elsewhere.tsv")
    status = ["git", "-C", tmp_path, "status", "--short"]
    left = subprocess.check_output(status, text=True).split("\n")
    assert left == ["?? .gitignore", "?? elsewhere.tsv", ""]
    text = path.read_text("utf-8")
    assert not re.search(r'(?:src|href|srcset)="(?!data:image/png;base64,)', text)
    images = re.findall('base64,([^"]+)', text)
    assert len(images) == 4  # progress and drift, light and dark
    for data in [
        *map(base64.b64decode, images),
        (tmp_path / "progress.png").read_bytes(),
    ]:
        assert data.startswith(b"\x89PNG")


# ---- The picture -----------------------------------------------------------------------
def test_labels_count_as_the_table_does_and_do_not_overlap():
    lines, best = list(NIGHT[:3]), 0.998
    for i in range(40):
        kept = i % 3 == 0
        best -= 0.001 * kept
        value, status = best + 0.002 * (not kept), "keep" if kept else "discard"
        lines.append((f"{i:07x}", value, status, f"idea number {i} of many, seed 42"))
    night = analyse(log(lines))
    figure = analysis.picture(night)
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    labels = {int(text.get_text().split()[0]): text.get_text() for text in texts}
    gains = {c.number: f"(gain\u00a0{c.gain:.4f})" for c in night.tried("keep")}
    assert set(labels) == set(gains) and len(gains) == 13
    whole = {n: text for n, text in labels.items() if " " in text or "\n" in text}
    assert len(whole) > 6 and all(gains[n] in text for n, text in whole.items())
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    frame = figure.axes[0].get_window_extent()
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_what_a_night_without_gains_tried_is_not_all_above_the_picture():
    """The numbers of a real one; two thirds of its experiments were above."""
    base = (1.213591, 1.211656, 1.211768)
    tried = [1.217956, 1.212848, 1.218899, 1.215826, 1.216031, 1.218060, 1.212549, 1.9]
    lines = [
        ("aaaaaaa", x, "keep", f"baseline, seed {i}") for i, x in enumerate(base, 42)
    ]
    for i, x in enumerate(tried):
        lines.append((f"bbbbbb{i}", x, "discard", f"idea {i}, seed 42"))
    night = analyse(log(lines))
    bottom, top = analysis.picture(night).axes[0].get_ylim()
    assert sum(x < top for x in tried) >= 4 and top < 1.22
    assert night.luck and bottom < night.start.mean - night.luck  # a line of the picture


def test_every_mark_has_a_legend():
    night = analyse(log([*NIGHT, ("8888888", 1.5, "discard", "far off, seed 42")]))
    figure = analysis.picture(night)
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    dark = draw_night(night, dark=True).legends[0].get_texts()
    assert {to_hex(text.get_color()) for text in dark} == {DARK["ink"]}
    assert shown == {
        f"best so far, and one noise ({night.noise:.4f}) around it",
        "kept",
        "discarded",
        "discarded, above the picture",
        "no number",
        "baseline",
        "all runs of a commit",
        "control: an earlier commit again",
        "start less the expected luck of the best",
    }


# ---- train.py --------------------------------------------------------------------------
def test_parts_are_functions_classes_and_blocks_of_constants():
    source = "# ---- Knobs ----\n# Model\nDEPTH = 9\n\n# Batch, in rows\nROWS = 4\nA, B = 1, 2\n\n"
    source += "def f():\n    return 1\n\n\nclass G:\n    pass\n"
    assert list(parts(source)) == ["knobs: Model", "knobs: Batch", "f", "G"]
    other = parts(source.replace("DEPTH = 9", "DEPTH = 8"))
    assert [k for k, v in parts(source).items() if other[k] != v] == ["knobs: Model"]


class Repository:
    """A repository in which train.py is committed."""

    def __init__(self, folder):
        self.folder = folder
        who = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
        self.start = ["git", "-C", str(folder), *who, "-c", "commit.gpgsign=false"]
        self.git("init", "-q")

    def git(self, *command: str) -> str:
        return subprocess.check_output([*self.start, *command], text=True).strip()

    def commit(self, text: str, on: str = "HEAD") -> str:
        """Commit `text` as train.py on top of a commit; return the hash as a log has it."""
        if on != "HEAD":
            self.git("checkout", "-q", on)
        (self.folder / "train.py").write_text(text)
        self.git("add", "train.py")
        self.git("commit", "-qm", "a")
        return self.name()

    def name(self) -> str:
        return self.git("rev-parse", "HEAD")[:8]


@pytest.fixture
def repository(tmp_path) -> Repository:
    return Repository(tmp_path)


def with_a_leak(repository: Repository) -> list[tuple]:
    """Return lines of a night whose first keep was withdrawn after two attempts on top."""
    base = repository.commit("A = 1\n")
    near = repository.commit("A = 2\n", base)
    leak = repository.commit("A = 3\n", base)
    again = repository.commit("A = 4\n", leak)
    slip = repository.commit("A = 5\n", leak)
    lines = [(base, 1.6, "keep", f"baseline, seed {seed}") for seed in (42, 43)]
    lines += [(near, 1.5997, "discard", "a comment, seed 42")]
    lines += [(leak, 1.3, "discard", "a leak, seed 42, void: sees the future")]
    lines += [(again, 1.31, "discard", "one layer on the leak, seed 42")]
    return [*lines, (slip, 0, "crash", "a slip on the leak, seed 42")]


def test_what_was_made_on_a_withdrawn_change_is_no_advice_and_no_point(repository, quick):
    lines = with_a_leak(repository)
    night = analyse(log(lines), repository.folder)
    text = words(write_page(night)).partition("Every experiment")
    assert "leak" not in text[0] and "a comment (gain +0.0003" in text[0]
    start = "1.6000 \u2192 1.6000, 4 experiments, 0 kept, 3 left out, noise"
    assert headline(night).startswith(start)
    assert text[2].count(f"made on top of {lines[3][0]}, withdrawn") == 2
    assert [c.idea for c in night.rivals] == ["a comment"]
    ax = draw_night(night).axes[0]
    points = {y for drawn in ax.collections for _, y in drawn.get_offsets()}
    assert 1.5997 in points and 1.31 not in points and ax.get_ylim()[0] > 1.5


def test_what_was_made_once_a_withdrawn_change_is_out_again_counts(repository):
    base = repository.commit("A = 1\n\n\n\n\nB = 1\n")
    leak = repository.commit("A = 2\n\n\n\n\nB = 1\n")
    wide = repository.commit("A = 2\n\n\n\n\nB = 2\n")
    on_it = repository.commit("A = 2\n\n\n\n\nB = 3\n", wide)
    repository.git("checkout", "-q", wide)
    repository.git("revert", "--no-edit", leak)
    revert = repository.name()
    after = repository.commit("A = 1\n\n\n\n\nB = 4\n")
    lines = [(base, 1.6, "keep", f"baseline, seed {seed}") for seed in (42, 43)]
    lines += [(leak, 1.3, "discard", "a leak, seed 42, void: sees the future")]
    lines += [(wide, 1.2, "discard", f"wide, seed 42, void: stood on {leak}")]
    lines += [(on_it, 1.21, "discard", "wider on it, seed 42")]
    lines += [(revert, 1.5, "keep", f"without {leak}, seed 42")]
    lines += [(after, 1.4996, "discard", "after it, seed 42")]
    night = analyse(log(lines), repository.folder)
    assert {c.idea: c.gone for c in night.every if c.gone} == {
        "a leak": leak,
        "wide": leak,
        "wider on it": leak,
    }
    assert [c.idea for c in night.tried("discard")] == ["after it"]


def test_the_page_names_the_commands_that_run_a_near_miss_again(repository, quick):
    text = "A = 1\n" + 9 * "\n" + "B = 1\n"
    base = repository.commit(text)
    early = repository.commit(text.replace("A = 1", "A = 2"), base)
    kept = repository.commit(text.replace("B = 1", "B = 2"), base)
    late = repository.commit(text.replace("B = 1", "B = 3"), kept)
    repository.git("checkout", "-q", kept)
    lines = [(base, 1.6, "keep", f"baseline, seed {seed}") for seed in (42, 43)]
    lines += [(early, 1.5996, "discard", "early, seed 42")]
    lines += [(kept, 1.599, "keep", "kept, seed 42")]
    lines += [(late, 1.5987, "discard", "late, seed 42")]
    shown = page.try_next(analyse(log(lines), repository.folder))
    commands = dict(re.findall("</b> (early|late) .*?: <code>(git .*?)</code>", shown))
    assert 'then <code>uv run experiment.py run "IDEA"</code>' in shown
    for idea, there in (("early", "A = 2 B = 2"), ("late", "A = 1 B = 3")):
        repository.git("checkout", "-q", "--", "train.py")
        subprocess.run(commands[idea], shell=True, cwd=repository.folder, check=True)
        assert " ".join((repository.folder / "train.py").read_text().split()) == there
        assert repository.name() == kept
    assert "git" not in page.try_next(analyse(log(lines), repository.folder / "none"))
    earlier = analyse(log(lines), repository.folder)
    earlier.tonight = (
        False  # its runs are not in tonight's log, nor is its best the branch's
    )
    assert "git show" in page.try_next(earlier) and "restore" not in page.try_next(
        earlier
    )


def test_the_page_says_what_the_bests_train_py_gave_on_other_gpus(repository, quick):
    base = repository.commit("A = 1\n")
    here = repository.commit("A = 2\n", base)
    there = repository.commit("A = 2\n", repository.commit("A = 3\n", base))
    lines = [(base, 1.6, "keep", f"baseline, seed 42, gpu {gpu}") for gpu in "01"]
    lines += [(here, 1.5, "keep", "two, seed 42, gpu 0")]
    lines += [(there, 1.52, "discard", "two again, seed 42, gpu 1")]
    said = words(page.best_commit(analyse(log(lines), repository.folder)))
    assert "The same train.py gave 1.520000 on GPU 1." in said
    assert f"git diff {base} {here} -- train.py" in said
    assert "git diff" not in page.best_commit(
        analyse(log(lines), "/")
    )  # nor would it work
    for few, folder in ((lines[:3], repository.folder), (lines, "/")):
        assert "same train.py" not in page.best_commit(analyse(log(few), folder))


def test_a_gpu_without_a_baseline_that_has_a_number_gives_a_page(quick):
    lines = [("aaaaaa0", 0.0, "crash", "baseline, seed 42")]
    lines += [("bbbbbb1", 0.44, "discard", "wider, seed 42, 2000 steps, 1.0 M tok/s")]
    assert "2 runs: 1 counted, 1 crashed" in words(write_page(analyse(log(lines))))


def test_what_may_be_luck_is_kept_so_the_page_names_no_seed(quick):
    lines = [*NIGHT[:3], ("8888888", 0.9965, "keep", "wider, seed 42")]
    text = words(page.try_next(analyse(log(lines))))
    assert "another seed" not in text and "1 wider (gain" in text
    assert "The best runs again after every 10 experiments, as a control" in text


def test_where_git_cannot_tell_the_page_is_written_as_the_log_has_it(
    repository, tmp_path_factory, quick
):
    lines = with_a_leak(repository)
    there = words(write_page(analyse(log(lines), tmp_path_factory.mktemp("without git"))))
    assert "one layer on the leak (gain +0.2900" in there
    lines = [(*x[:3], re.sub(r"(, seed \d+)", r"\1, gpu a", x[3])) for x in lines]
    lines += [
        ("0badcafe", 1.61, "keep", "baseline, seed 42, gpu b")
    ]  # of another machine
    lines += [("1badcafe", 1.60, "discard", "leak, seed 42, gpu b, void: why")]
    lines += [("2badcafe", 1.59, "discard", "there, seed 42, gpu b")]
    night = analyse(log(lines), repository.folder)
    assert "there" in words(page.try_next(night))
    assert len([c for c in night.every if c.gone]) == 4


def test_parts_that_no_experiment_touched(repository, quick):
    text = "# Model\nDEPTH = 9\n\n\ndef f():\n    return 1\n\n\ndef g():\n    return 2\n"
    base = repository.commit(text)
    deep = repository.commit(text.replace("9", "10"))
    slip = repository.commit(text.replace("9", "10").replace("return 1", "return 3 / 0"))
    changed = repository.commit(text.replace("9", "10").replace("return 1", "return 3"))
    broken = repository.commit("def (\n")
    lines = [
        (base, 0.990, "keep", "baseline, seed 42"),
        (deep, 0.98, "keep", "deep, seed 42"),
    ]
    lines += [
        (slip, 0, "crash", "f, seed 42"),  # one experiment with the next
        (changed, 0.985, "discard", "f, seed 42"),
        (broken, 0, "crash", "b, seed 42"),
    ]
    night = analyse(log(lines), repository.folder)
    text = words(page.try_next(night))
    assert "none of whose experiments was kept: f (1)." in text
    assert "that no experiment touched: g." in text
