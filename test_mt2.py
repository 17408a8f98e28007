"""Tests of mt2.py, each named after its claim: python -m pytest -q test_mt2.py (2 minutes on 2 cores).

As a script, python test_mt2.py prints benchmark tables instead: this code against peers that are installed
(nnAudio, librosa, lightly, pytorch-metric-learning) and against the machine's own matrix product."""
import ast
import contextlib
import dataclasses
import gc
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from torch.testing import assert_close

import mt2
import probe
from mt2 import (MT2, VQT, AudioFolder, Config, SyntheticMusic, TUNe, calibrate, cpsd, crop, key_profile,
                 key_signature, load, monitor, nt_xent, train, unit_range, verdict)

with contextlib.suppress(ImportError):  # the benchmark does without it
    import soundfile

HERE = Path(__file__).resolve().parent
TINY = dict(dim=24, depth=1, heads=2, frames=6, batch=4, fresh=2, pool=12, steps=8, save_every=3, warmup=2,
            workers=0, device="cpu")
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()] + ["--out=run"]
VALID = [("eq,con", "mel,vqt"), ("eq,con", "vqt"), ("eq", "mel,vqt"), ("eq", "vqt"),
         ("con", "mel,vqt"), ("con", "mel"), ("con", "vqt")]  # tasks and inputs that go together
FEW = """
import mt2
whole = mt2.SyntheticMusic.batch
def few(self, n, *rest, **more):  # the monitor's tracks (seeds 998 and 999) cut to 8: saves seconds per run
    return whole(self, min(n, 8) if self.seed in (998, 999) else n, *rest, **more)
mt2.SyntheticMusic.batch = few
mt2.torch.set_num_threads(1)
"""


@pytest.fixture(scope="session", autouse=True)
def quick():
    exec(FEW, {})


def tiny(out="unused", **more):
    return Config(**(TINY | {"out": str(out)} | more))


def model(**more):
    torch.manual_seed(0)
    return MT2(tiny(**more)).eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def tone(hertz, seconds=4.0, rate=16000):
    """Sines [len(hertz), samples] of amplitude 1."""
    t = torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    return (2 * math.pi * torch.as_tensor(hertz, dtype=torch.float64).view(-1, 1) * t).sin().float()


# ---- Losses ----------------------------------------------------------------------------------------------

def naive_nt_xent(a, b, t):
    """SimCLR's algorithm 1, written out in float64."""
    z = np.concatenate([a, b]).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    total, n = 0.0, len(z)
    for i in range(n):
        sim = [float(z[i] @ z[j]) / t for j in range(n) if j != i]
        total += math.log(sum(math.exp(s - 1 / t) for s in sim)) + (1 - float(z[i] @ z[(i + n // 2) % n])) / t
    return total / n


def autograd_nt_xent(a, b, t=0.1):
    """The same with the whole matrix, for autograd to differentiate."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    sim = (z @ z.T / t).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(sim, torch.arange(len(z), device=z.device).roll(len(a)))


def complex_cpsd(y_a, y_b, k, omega=7):
    """Cross-power spectral density with complex numbers."""
    dft = torch.exp(-2j * math.pi * omega * torch.arange(12, dtype=torch.float64) / 12).to(y_a.device)
    target = torch.exp(2j * math.pi * omega * torch.as_tensor(k).double() / 12)
    return ((target - (y_a.to(dft.dtype) @ dft) * (y_b.to(dft.dtype) @ dft).conj()).abs() ** 2).mean()


@pytest.mark.parametrize("B, P, scale, t", [(2, 3, 1, .1), (3, 1, 1e-3, .5), (17, 8, 1e4, .1), (90, 5, 1, 1)])
def test_nt_xent_equals_the_definition(B, P, scale, t):
    a, b = scale * noise(B, P).double(), noise(B, P, seed=1).double()
    expected = naive_nt_xent(a.numpy(), b.numpy(), t)
    assert nt_xent(a, b, t).item() == pytest.approx(expected, rel=1e-10)
    assert nt_xent(a.float(), b.float(), t).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("B", [2, 5, 255, 257, 700, 1100])  # below and above usual blocks, no multiples
def test_nt_xent_and_its_gradient_equal_autograd_of_the_formula(B):
    a, b = (noise(B, 7, seed=s).double().requires_grad_() for s in (0, 1))
    mine, plain = 3 * nt_xent(a, b, 0.2), 3 * autograd_nt_xent(a, b, 0.2)
    assert mine.item() == pytest.approx(plain.item(), rel=1e-10)
    assert_close(torch.autograd.grad(mine, (a, b)), torch.autograd.grad(plain, (a, b)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("B", [2, 8, 600])
def test_nt_xent_of_identical_embeddings_is_log_2b_minus_1_and_of_a_perfect_match_near_zero(B):
    same, one_hot = torch.ones(B, 16), torch.eye(B)
    assert nt_xent(same, same).item() == pytest.approx(math.log(2 * B - 1), abs=1e-4)
    assert nt_xent(one_hot, one_hot).item() < 0.06 and nt_xent(one_hot, one_hot.roll(1, 0)).item() > 9


@pytest.mark.parametrize("t", [0.01, 0.02, 0.03, 0.1])
def test_nt_xent_is_finite_and_right_with_zero_rows_identical_rows_and_a_tiny_temperature(t):
    a, b = noise(12, 6), noise(12, 6, seed=1)
    a[0], a[1], b[2], b[3], b[4] = 0, a[5], a[2], -a[3], b[5]
    a, b = a.requires_grad_(), b.requires_grad_()
    mine, plain = nt_xent(a, b, t), autograd_nt_xent(a.double(), b.double(), t)
    assert mine.item() == pytest.approx(plain.item(), rel=1e-4)
    for x, y in zip(torch.autograd.grad(mine, (a, b)), torch.autograd.grad(plain, (a, b))):
        assert x.abs().max() < 1e4
        assert_close(x[1:], y[1:], rtol=1e-3, atol=1e-4)  # row 0 of a is zero and has no direction
    assert nt_xent(a.where(a != 0, math.nan), b, t).isnan()  # what is broken is not hidden
    for wrong in (t / 1000, torch.tensor(t, requires_grad=True)):  # whose gradient would be missing
        with pytest.raises(ValueError, match="at least 0.01"):
            nt_xent(a, b, wrong)


def test_nt_xent_keeps_no_matrix_for_the_backward_pass():
    saved, a, b = [], noise(1500, 8).requires_grad_(), noise(1500, 8, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        loss = nt_xent(a, b)
    assert sum(saved) < 3000 * 3000 / 10 and loss.grad_fn.kept is None


@pytest.mark.parametrize("keep", [0, 2 ** 22])
def test_nt_xent_in_strips_among_processes_equals_one_process(keep, monkeypatch):
    """Two threads stand for two processes."""
    a, b = (noise(40, 6, seed=s).double().requires_grad_() for s in (0, 1))
    whole, sent, both, me = autograd_nt_xent(a, b), {}, threading.Barrier(2, timeout=20), threading.local()

    def gather(x):
        sent[me.rank] = x
        both.wait()
        found = torch.cat([sent[0], sent[1]])
        both.wait()
        return found
    monkeypatch.setattr(mt2, "gather", gather)
    monkeypatch.setattr(mt2.dist, "get_rank", lambda: me.rank)
    monkeypatch.setattr(mt2.NTXent, "KEEP", keep)

    def process(rank):
        me.rank, mine = rank, [x.detach().chunk(2)[rank].requires_grad_() for x in (a, b)]
        loss = mt2.NTXent.apply(torch.cat(mine), 0.1, 16)
        return loss.item(), torch.autograd.grad(loss, mine)
    with ThreadPoolExecutor(2) as pool:
        losses, grads = zip(*pool.map(process, (0, 1)))
    assert np.mean(losses) == pytest.approx(whole.item(), rel=1e-10)
    for mine, expected in zip(zip(*grads), torch.autograd.grad(whole, (a, b))):
        assert_close(torch.cat(mine) / 2, expected)  # the loop takes the mean over ranks


@pytest.mark.parametrize("B, omega", [(1, 7), (2, 1), (33, 7), (5, 2)])
def test_cpsd_equals_the_complex_definition(B, omega):
    y_a, y_b = (noise(B, 12, seed=s).mul(3).double().softmax(1) for s in (0, 1))
    k = torch.randint(-15, 16, (B,), generator=seeded(2))
    expected = complex_cpsd(y_a, y_b, k, omega).item()
    assert cpsd(y_a, y_b, k, omega).item() == pytest.approx(expected, abs=1e-12)
    assert cpsd(y_a.float(), y_b.float(), int(k[0]), omega).item() == pytest.approx(
        complex_cpsd(y_a, y_b, k[:1], omega).item(), abs=1e-5)


@pytest.mark.parametrize("omega", [1, 7])
def test_cpsd_is_0_for_a_rolled_one_hot_2_on_average_for_the_wrong_sign_and_1_for_a_uniform_y(omega):
    y = torch.eye(12, dtype=torch.float64)  # every pitch class
    right = [cpsd(y, y.roll(k, 1), k, omega).item() for k in range(-12, 13)]
    wrong = [cpsd(y, y.roll(-k, 1), k, omega).item() for k in range(12)]
    assert max(right) < 1e-12 and np.mean(wrong) == pytest.approx(2)
    assert cpsd(torch.full((12, 12), 1 / 12), y.float(), 5, omega).item() == pytest.approx(1, abs=1e-6)


def test_the_losses_refuse_what_they_would_get_wrong_in_silence():
    a, y = noise(4, 8).requires_grad_(), noise(4, 12).softmax(1)
    for wrong in (lambda: nt_xent(a, noise(6, 8)), lambda: nt_xent(a[0], a[1]), lambda: nt_xent(a[:0], a[:0]),
                  lambda: cpsd(y, y, torch.zeros(4, 1)), lambda: cpsd(y, y[:1], 3)):
        with pytest.raises(ValueError, match="must"):
            wrong()
    with pytest.raises(RuntimeError, match="first derivative only"):  # it would count as zero
        torch.autograd.grad(nt_xent(a, noise(4, 8, seed=1)), a, create_graph=True)


def test_both_losses_pass_gradcheck():
    a, b = (noise(4, 12, seed=s).double().requires_grad_() for s in (0, 1))
    k = torch.tensor([0, 3, -5, 11])
    assert torch.autograd.gradcheck(nt_xent, (a, b))
    assert torch.autograd.gradcheck(lambda a, b: cpsd(a.softmax(1), b.softmax(1), k), (a, b))


def test_both_losses_in_bf16_and_under_autocast_are_close_to_float32():
    a, b = noise(300, 12).requires_grad_(), noise(300, 12, seed=1)
    for loss in (nt_xent, lambda a, b: cpsd(a.softmax(1), b.softmax(1), 3)):
        full = loss(a, b)
        grad = torch.autograd.grad(full, a)[0]
        with torch.autocast("cpu", torch.bfloat16):
            for x in (a, a.bfloat16()):
                low = loss(x, b.to(x.dtype))
                assert low.dtype == torch.float32 and low.item() == pytest.approx(full.item(), rel=0.01)
                assert (torch.autograd.grad(low, a)[0] - grad).norm() < 0.05 * grad.norm()


def test_under_autocast_the_losses_and_the_front_end_are_those_of_float32():
    a, b, front, vqt = noise(300, 12), noise(300, 12, seed=1), mt2.FrontEnd(), VQT()
    parts = (nt_xent, lambda a, b: cpsd(a.softmax(1), b.softmax(1), 3), lambda a, b: front(a.view(1, -1))[0],
             lambda a, b: vqt(a.view(1, -1)))
    plain = [f(a, b) for f in parts]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(f(a, b), x) for f, x in zip(parts, plain))


# ---- Front ends ------------------------------------------------------------------------------------------

SEMITONES = 27.5 * 2 ** (torch.arange(99, dtype=torch.float64) / 12)  # Hz of the VQT's bins
EXTREME = {"silence": torch.zeros(64000), "DC": torch.ones(64000), "full scale": tone([440])[0].sign(),
           "click": torch.eye(64, 64000)[40], "first": torch.eye(1, 64000)[0], "whisper": 1e-7 * noise(64000)}


def test_a_tone_hits_its_bin_and_reads_its_amplitude_in_every_bin():
    level = VQT().magnitude(0.3 * tone(SEMITONES))[:, 63]  # [99 tones, 99 bins], in the middle of the clip
    assert (level.argmax(1) == torch.arange(99)).all()
    assert_close(level.diagonal(), torch.full((99,), 0.3), rtol=0.03, atol=0)


def test_mel_is_torchaudios_and_a_full_scale_sine_reads_about_0_db():
    published = torchaudio.transforms.MelSpectrogram(16000, 1024, hop_length=512, n_mels=128)
    wave = 0.1 * noise(2, 64000)
    assert_close(mt2.FrontEnd()(wave)[0], 10 * (published(wave).mT / 256 ** 2).clamp_min(1e-16).log10(),
                 rtol=0, atol=1e-3)
    mel, vqt = mt2.FrontEnd()(tone([880]))
    assert abs(mel[0, 63].max()) < 3 and abs(vqt[0, 63].max()) < 0.3


@pytest.mark.parametrize("n_bins", [12, 48, 60, 72])  # their top octaves lie at different rates
def test_a_vqt_of_few_bins_has_the_same_frames_and_bins(n_bins):
    few = VQT(n_bins=n_bins).magnitude(tone(SEMITONES[:n_bins]))
    assert few.shape == (n_bins, 126, n_bins) and (few[:, 63].argmax(1) == torch.arange(n_bins)).all()


@pytest.mark.parametrize("frame, j", [(63, 0), (0, 30), (125, 40), (70, 59), (63, 60), (40, 98)])
def test_vqt_equals_a_direct_correlation_in_float64(frame, j):
    hertz = float(SEMITONES[j])
    width = 16000 * max(1 / ((2 ** (1 / 12) - 1) * hertz), 1 / (8000 - hertz))
    t = np.arange(-math.ceil(width / 2) + 1, math.ceil(width / 2))
    hann = np.cos(np.pi * t / width) ** 2
    heard = np.pad(noise(64000).double().numpy(), 8192)[8192 + 512 * frame + t]
    direct = abs((heard * hann * np.exp(-2j * np.pi * hertz * t / 16000)).sum()) * 2 / hann.sum()
    assert VQT().magnitude(noise(1, 64000))[0, frame, j].item() == pytest.approx(direct, rel=2e-3)


def test_a_vqt_of_other_arguments_hits_its_bins_and_gamma_widens_the_bass():
    hertz = 55 * 2 ** (torch.arange(72, dtype=torch.float64) / 24)
    level = VQT(8000, 256, 55, 72, 24).magnitude(tone(hertz, rate=8000))[:, 63]
    assert (level.argmax(1) == torch.arange(72)).all()
    assert_close(level.diagonal(1), torch.full((71,), 0.5), rtol=0.1, atol=0)  # a bin's width
    wide = VQT(8000, 256, 55, 72, 24, gamma=20.0).magnitude(tone(hertz[:1], rate=8000))[0, 63]
    assert wide[0] == pytest.approx(1, abs=0.03) and wide[1] > 0.9
    with pytest.raises(ValueError, match="must lie below half of 8000 Hz"):
        VQT(8000)


@pytest.mark.parametrize("semitones", [1, 3, 15])
def test_a_crop_is_a_transposition(semitones):
    chord = lambda up: tone(SEMITONES[[20, 40, 60]] * 2 ** (up / 12)).mean(0, keepdim=True)
    spectrum = lambda up: VQT().magnitude(chord(up))[:, 20:106]  # away from the edges
    low, high = (crop(spectrum(up), torch.tensor([up])) for up in (0, semitones))
    assert_close(high, low, rtol=0, atol=0.001)  # of 0.33 a tone
    assert (spectrum(semitones)[..., :84] - low).abs().max() > 0.1  # uncropped they differ


def test_equalisers_are_linear_between_octaves_and_stronger_at_the_ends():
    curves = mt2.random_equaliser(4000, 3.0, seeded(0))
    assert curves.shape == (4000, 1, 99)
    assert_close(curves[..., 54], (curves[..., 48] + curves[..., 60]) / 2)
    std = curves[:, 0].std(0)[[0, 48, 96]]
    assert_close(std, 3 * torch.tensor([2 ** 0.5, 1, 2 ** 0.5]), rtol=0.05, atol=0)


def test_unit_range_is_db_over_80_plus_1():
    assert unit_range(torch.tensor([[[-10., -30., -50., -99.]]])).flatten().tolist() == [1, 0.75, 0.5, 0]


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_sound_gives_finite_features_from_0_to_1_and_silence_0(name):
    wave = EXTREME[name][None]
    mel, vqt = (unit_range(x) for x in mt2.FrontEnd()(wave))
    assert mel.shape == (1, 126, 128) and vqt.shape == (1, 126, 99)
    for x in (mel, vqt, VQT()(wave)):
        assert x.isfinite().all() and x.min() >= 0 and x.max() <= (0 if name == "silence" else 1)
    assert all(x.isfinite().all() for x in model()(wave))


def test_decibels_end_at_minus_160():
    assert VQT().decibels(torch.zeros(1, 64000)).unique().tolist() == [-160]


def test_clips_do_not_depend_on_their_batch():
    waves, net = torch.stack([0.001 * noise(64000), EXTREME["silence"], EXTREME["full scale"]]), model()
    mel = lambda w: unit_range(mt2.FrontEnd()(w)[0])
    for f in (VQT(), mel, lambda w: net(w).y, lambda w: net(w).z, lambda w: net(w).tokens):
        assert_close(f(waves)[:1], f(waves[:1]), rtol=1e-4, atol=1e-5)


# ---- Models ----------------------------------------------------------------------------------------------

def million(net):
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("head_con")) / 1e6


def test_the_paper_size_has_the_published_values_and_5_3_to_5_6_million_parameters():
    c = Config(size="paper")
    assert (c.dim, c.depth, c.heads, c.batch, c.temperature) == (192, 12, 3, 128, 0.1)
    assert 5.3 < million(MT2(c)) < 5.6


@pytest.mark.parametrize("expansion, millions", [(0, 2.4), (1, 2.1), (4, 2.2)])
def test_tune_has_the_published_size_its_stages_and_one_embedding_per_clip(expansion, millions):
    net = TUNe(tiny(encoder="tune", expansion=expansion)).eval()
    stages = net.layers(noise(2, 64000))
    powers = [*range(9, -1, -1), 0]  # SampleCNN: 3^9 frames after its first convolution, down to one
    if expansion:  # down to 3^6, up again, down to three
        powers = [10, 9, 8, 7, 6, *range(7, 7 + expansion), *range(5 + expansion, 0, -1)]
    assert [stage.shape[1] for stage in stages] == [3 ** n for n in powers]
    assert stages[-1].shape[::2] == (2, 512)
    assert net(noise(2, 64000)).shape == (2, 64) and round(million(net), 1) == millions


def test_tune_hears_the_middle_59049_samples_alone():
    net, waves = TUNe(tiny(encoder="tune")).eval(), noise(2, 64000)
    assert torch.equal(net(F.pad(waves[:, 2475:61524], (2475, 2476))), net(waves))
    assert torch.equal(net(waves[:, :20000]), net(F.pad(waves[:, :20000], (0, 39049))))  # the rest is silence


def test_tune_refuses_what_is_no_batch_of_waves():
    net = TUNe(tiny(encoder="tune"))
    for shape in ((64000,), (1, 64001), (1, 0), (1, 1, 64000), (0, 64000)):
        with pytest.raises(ValueError, match="TUNe takes waves"):
            net(torch.zeros(shape))
    with pytest.raises(ValueError, match="TUNe takes waves .* in floating point, not .*int16"):
        net(torch.zeros(1, 64000, dtype=torch.int16))


def test_tunes_expansion_is_joined_with_the_contraction_and_its_tail_with_the_expansion():
    net, given, made = TUNe(tiny(encoder="tune")).eval(), {}, {}
    for name in ("down", "join", "tail"):
        for i, stage in enumerate(getattr(net, name)):
            stage.register_forward_hook(lambda m, x, out, key=(name, i): (
                given.update({key: x[0]}), made.update({key: out}), None)[2])
    net(noise(1, 64000))
    for i in range(4):
        for name, other in (("join", made["down", 3 - i]), ("tail", made["join", 2 - i] if i < 3
                                                            else made["down", 4])):
            assert torch.equal(given[name, i][:, -other.shape[1]:], other)


@pytest.mark.parametrize("tasks, inputs", VALID)
def test_every_valid_model_has_its_shapes(tasks, inputs):
    net = model(tasks=tasks, inputs=inputs, depth=2)
    y, z, tokens = net(noise(3, 64000))
    n_cls = len(net.class_tokens)
    layers = net.layers(noise(3, 64000))
    assert net.class_tokens == tuple(tasks.split(",")) and layers.shape == (3, 3, n_cls + 126, 24)
    assert torch.equal(layers[-1], tokens)
    assert (y is None) == ("eq" not in tasks) and (z is None) == ("con" not in tasks)
    assert y is None or y.shape == (3, 12) and y.min() >= 0 and torch.allclose(y.sum(1), torch.ones(3))
    assert z is None or z.shape == (3, 64)
    assert net(noise(1, 513)).tokens.isfinite().all()  # the shortest that the mel transform takes
    for shape in ((64000,), (1, 64001), (1, 512), (1, 100), (1, 1, 64000), (0, 64000)):
        with pytest.raises(ValueError, match="MT2 takes waves"):
            net(torch.zeros(shape))
    for wave in (np.zeros((1, 64000)), torch.zeros(1, 64000, dtype=torch.int16)):
        with pytest.raises(ValueError, match="floating-point"):
            net(wave)


@pytest.mark.parametrize("kind, most", [(torch.float16, 0.01), (torch.bfloat16, 0.1), (torch.float64, 1e-3)])
def test_a_model_in_another_precision_hears_what_it_heard(kind, most):
    wave = SyntheticMusic(3).batch(2, 0)[0][:, 0]
    assert_close(VQT().to(kind)(wave).float(), VQT()(wave), rtol=0, atol=1e-4)
    net, other = model(), model().to(kind)
    with torch.no_grad():
        found, expected = other(wave), net(wave)
    assert found.tokens.dtype == kind
    assert other.logits(found.tokens[:, 0]).dtype == torch.promote_types(kind, torch.float32)
    assert_close(found.tokens.float(), expected.tokens, rtol=0, atol=most)
    assert_close(found.y.float(), expected.y, rtol=0, atol=most)


def test_waves_as_float64_give_what_float32_gives_and_all_outputs_have_gradients_to_the_wave():
    net, tune, wave = model(), TUNe(tiny(encoder="tune")).eval(), noise(2, 64000)
    wave[:, 20000:] = 0  # in silence a root has no gradient
    for f in (VQT(), tune, lambda wave: net(wave).tokens):
        assert torch.equal(f(wave.double()), f(wave))
    wave.requires_grad_()
    found = net(wave)
    for x in (found.y[:, 0], found.z, tune(wave)):
        grad, = torch.autograd.grad(x.sum(), wave, retain_graph=True)
        assert grad.isfinite().all() and grad.abs().max() > 0


def test_the_encoder_is_torchs_pre_norm_transformer_on_tokens_positions_and_means_of_own_branches():
    net, mel, vqt, frames = model(depth=2), noise(3, 4, 128), noise(3, 4, 84), torch.tensor([0, 40, 41, 125])
    layers, m, v = net.encode(mel, vqt, frames), net.patch_mel(mel), net.patch_vqt(vqt)
    cls = net.cls + torch.stack([v.mean(1), m.mean(1)], 1)  # eq: VQT, con: mel
    x = torch.cat([cls, m + v], 1) + net.position[[0, 1, 2, 42, 43, 127]]
    assert_close(layers[0], x)
    for block in net.blocks:
        peer = torch.nn.TransformerEncoderLayer(24, 2, 96, 0.0, "gelu", batch_first=True, norm_first=True)
        values = [*block.state_dict().values()]  # ours begin with the norms, theirs end with them
        peer.load_state_dict(dict(zip(peer.state_dict(), values[4:] + values[:4])))
        x = peer(x)
    assert_close(layers[-1], net.norm(x))


def test_sequence_tokens_are_the_mean_of_both_passes_and_without_hiding_there_is_one():
    passes, layers = model().passes(noise(2, 64000)), model().layers(noise(2, 64000))
    assert_close(layers[:, :, 2:], passes.mean(0)[:, :, 2:])
    seen = model(hide_mel=0)
    paid = probe.attention(seen, noise(2, 64000))
    assert len(passes) == 2 and len(seen.passes(noise(2, 64000))) == 1
    assert (paid["eq"] - paid["con"]).abs().max() > 1e-5  # each its own row of one map


@pytest.mark.parametrize("hide_mel", [0, 1])
@pytest.mark.parametrize("tasks, inputs", [("eq,con", "mel,vqt"), ("eq", "mel,vqt"), ("eq", "vqt")])
def test_pitch_alone_is_the_y_of_the_whole_model(tasks, inputs, hide_mel):
    net, wave = model(tasks=tasks, inputs=inputs, hide_mel=hide_mel), noise(2, 64000)
    assert_close(net.pitch(wave)[0], net(wave).y, rtol=1e-4, atol=1e-6)


def test_an_offset_is_an_int_or_one_per_clip_and_the_middle_by_default():
    net, wave = model(), noise(2, 64000)
    y = net(wave, torch.tensor([3, 8])).y
    assert_close(y, torch.stack([net(wave, 3).y[0], net(wave).y[1]]), rtol=1e-4, atol=1e-6)
    assert_close(net.pitch(wave, (3, 8))[:, 0], torch.stack([y[0], net(wave).y[0]]), rtol=1e-4, atol=1e-6)
    assert (y[0] - net(wave).y[0]).abs().max() > 1e-3
    assert torch.equal(y, net(wave, torch.tensor([3, 8], dtype=torch.uint8)).y)  # an index, not a mask
    for beyond in (16, -1, torch.tensor([3, 16])):
        with pytest.raises(ValueError, match="offset must lie between 0 and 15"):
            net(wave, beyond)
        with pytest.raises(ValueError, match="offset"):
            net.pitch(wave, (8, beyond))
    for odd in (3.0, torch.tensor([3, 8, 3]), torch.tensor([3])):
        with pytest.raises(ValueError, match="offset must be a whole number, or one for each of 2 waves"):
            net(wave, odd)


def test_the_equivariant_token_is_blind_to_mel_and_the_contrastive_one_is_not():
    net, wave = model(), noise(2, 64000)
    before, eq = net(wave), net.layers(wave)[:, :, 0]
    other_mel = lambda module, given, out: (out[0] + 20 * noise(2, 126, 128, seed=5), out[1])
    net.front_end.register_forward_hook(other_mel)
    after = net(wave)
    assert torch.equal(before.y, after.y) and torch.equal(eq, net.layers(wave)[:, :, 0])
    assert (before.z - after.z).abs().max() > 1e-3


def test_in_training_eq_reaches_only_the_equivariant_views_and_mel_only_the_contrastive_ones():
    mel, vqt = (30 * noise(6, 2, 126, bins, seed=bins) - 60 for bins in (128, 99))  # dB

    def terms(mel, eq_db):
        return mt2.losses(model(eq_db=eq_db).train(), [mel, vqt], seeded(1))
    plain, coloured, other_mel = terms(mel, 0.0), terms(mel, 20.0), terms(mel.flip(0), 0.0)
    assert plain["nt_xent"] == coloured["nt_xent"] and (plain["cpsd"] - coloured["cpsd"]).abs() > 1e-3
    assert plain["cpsd"] == other_mel["cpsd"] and (plain["nt_xent"] - other_mel["nt_xent"]).abs() > 1e-3


def test_an_equivariant_model_that_hides_mel_has_no_mel_branch():
    assert tiny(tasks="eq").inputs == model(tasks="eq").config.inputs == ("vqt",)
    assert tiny(tasks="eq", hide_mel=0).inputs == ("mel", "vqt")


def test_each_task_has_views_of_its_own_length_and_frames(monkeypatch):
    net, seen = model(frames=16, con_frames=2), []
    encode = net.encode

    def spy(mel, vqt, frames, **how):
        seen.append((mel if mel is None else tuple(mel.shape), tuple(vqt.shape), tuple(frames.tolist())))
        return encode(mel, vqt, frames, **how)
    monkeypatch.setattr(net, "encode", spy)
    for seed in (1, 2):
        mt2.losses(net, [noise(5, 2, 126, bins, seed=bins) for bins in (128, 99)], seeded(seed))
    (con, eq), (other_con, other_eq) = seen[:2], seen[2:]
    assert con[:2] == ((10, 2, 128), (10, 2, 84)) and eq[:2] == (None, (15, 16, 84))  # A, B; A, B, A'
    for frames in (con[2], eq[2]):
        parts = [(len(frames) * (frame + 1) - 1) // 126 for frame in frames]
        assert parts == list(range(len(frames)))  # one out of each equal part of the 4 s
    assert con[2] != other_con[2] and eq[2] != other_eq[2]  # of every step its own


def test_each_loss_gets_the_tokens_pairs_and_temperature(monkeypatch):
    """With all 126 frames, one crop and no equaliser the views are the segments themselves."""
    net, waves, seen = model(frames=126, con_frames=126, eq_db=0.0, temperature=0.3), noise(4, 2, 64000), []
    monkeypatch.setattr(mt2, "crop", lambda vqt, offset: vqt[..., 8:92])
    monkeypatch.setattr(mt2, "autocast", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(mt2, "nt_xent", lambda *given: seen.append(given) or nt_xent(*given))
    monkeypatch.setattr(net, "logits", lambda token: seen.append(token) or MT2.logits(net, token))
    mt2.losses(net, [x.unflatten(0, (4, 2)) for x in net.front_end(waves.flatten(0, 1))], seeded(0))
    a, b = net(waves[:, 0]), net(waves[:, 1])
    assert_close(seen[0], (a.z, b.z, 0.3))
    assert_close(seen[1], torch.cat([x.tokens[:, 0] for x in (a, b, a)]))


def test_every_view_has_a_crop_and_an_equaliser_of_its_own(monkeypatch):
    seen, same = [], [30 * noise(5, 1, 126, bins).expand(-1, 2, -1, -1) - 60 for bins in (128, 99)]  # A is B
    monkeypatch.setattr(mt2, "crop", lambda vqt, offset: seen.append((vqt, offset)) or crop(vqt, offset))
    mt2.losses(model(), same, seeded(1))
    (_, con), (vqt, eq) = seen
    for x in (con.view(2, 5), eq.view(3, 5), vqt.view(3, 5, -1)):
        assert len(x.unique(dim=0)) == len(x)


def test_tunes_positives_are_the_two_segments_of_a_track():
    waves = noise(6, 2, 8)
    net = types.SimpleNamespace(config=tiny(encoder="tune", temperature=0.3), encode=lambda wave: wave)
    expected = nt_xent(waves[:, 0], waves[:, 1], 0.3)
    assert_close(mt2.losses(net, [waves], None)["nt_xent"], expected)


def test_class_tokens_alone_and_their_gradients_are_those_of_the_whole_sequence():
    net, mel, vqt = model().double(), noise(3, 9, 128).double(), noise(3, 9, 84).double()
    whole, alone = net.encode(mel, vqt)[-1][:, :2], net.encode(mel, vqt, cls_only=True)[-1]
    assert alone.shape == (3, 2, 24)
    assert_close(alone, whole)
    used = [p for name, p in net.named_parameters() if "head" not in name]
    assert_close(*(torch.autograd.grad(x[..., 5].square().sum(), used) for x in (alone, whole)))


def test_centring_removes_exactly_what_depends_on_the_offset_alone():
    net, offset = model(), torch.arange(64) % 16
    logits, shortcut = noise(64, 12), 10 * noise(16, 12, seed=1)
    plain = net.center(logits, offset, training=True)
    assert_close(net.center(logits + shortcut[offset], offset, training=True), plain, rtol=0, atol=1e-5)
    assert_close(plain.square().mean(1), torch.full((64,), 0.25), rtol=1e-3, atol=0)  # each clip its own std


def test_centring_outside_of_training_knows_the_offsets_and_not_the_batch():
    net, offset, shortcut = model(), torch.arange(64) % 16, 5 * noise(16, 12)
    for seed in range(60):
        net.center(noise(64, 12, seed=seed) + shortcut[offset], offset, training=True)
    logits, offset = noise(16, 12, seed=99), torch.arange(16)
    centred, plain = net.center(logits + shortcut, offset), net.center(logits + net.offset_mean, offset)
    assert (centred - plain).abs().mean() < 0.1 < shortcut.abs().mean() / 10  # means have followed
    assert torch.equal(net.center((logits + shortcut)[3:4], torch.tensor([3])), centred[3:4])
    fresh, wave = model().train(), noise(2, 64000)  # a new model is in training mode
    assert_close(fresh(wave)[0][:1], fresh(wave[:1])[0])
    assert fresh.offset_mean.eq(0).all()


def test_the_running_mean_moves_by_a_tenth_and_only_where_there_were_clips():
    net, logits, expected = model(), noise(6, 12), torch.ones(16, 12)
    net.offset_mean.fill_(1)
    net.center(logits, torch.full((6,), 3), training=True)
    expected[3] = 0.9 + 0.1 * logits.mean(0)
    assert_close(net.offset_mean, expected)
    same = torch.ones(2, 12, requires_grad=True)  # nothing is left of them: no root of 0
    net.center(same, torch.tensor([5, 5]), training=True).sum().backward()
    assert same.grad.isfinite().all()


def test_a_new_model_lets_each_bin_through_to_its_output_past_small_branches():
    net = model(tasks="eq", dim=96, depth=3, heads=3)
    assert_close(net.patch_vqt[1].weight, 1.5 * torch.eye(96, 84))
    assert_close(net.head_eq.weight, 1.5 * net.patch_vqt[1].weight.T)
    for block in net.blocks:
        for last in block.out, block.mlp[2]:
            assert last.weight.std().item() == pytest.approx(0.2 * last.in_features ** -0.5, rel=0.2)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what makes the program wait for the device: blocking copies and numbers read from it."""
    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, aten = f(*args, **(kwargs or {})), torch.ops.aten
        if f in (aten._to_copy.default, aten.copy_.default):
            source, target = (args[1], args[0]) if f is aten.copy_.default else (args[0], out)
            blocking = not (kwargs or {}).get("non_blocking", args[2:] == (True,))
            self.count += blocking and source.device != target.device
        self.count += f in (aten._local_scalar_dense.default, aten.nonzero.default)
        return out


@pytest.mark.parametrize("tasks, inputs", VALID)
def test_on_a_gpu_nothing_meets_a_tensor_of_another_device_nor_waits_for_it(tasks, inputs, monkeypatch):
    """Without a GPU: fake tensors know their shape and device alone, and refuse what is on another one."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    net = model(tasks=tasks, inputs=inputs)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: True)  # they hold no values
    monkeypatch.setattr(mt2, "autocast", lambda device: contextlib.nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = lambda *shape, dtype=torch.float: torch.empty(shape, dtype=dtype, device="cuda:0")
        for module in net.modules():
            for own in module._parameters, module._buffers:
                own.update({name: on_gpu(*x.shape, dtype=x.dtype) for name, x in own.items()})
        wave, batch = on_gpu(3, 64000), [on_gpu(4, 2, 126, bins, dtype=torch.half) for bins in (128, 99)]
        with torch.no_grad():
            with Waits() as waits:
                found = [*mt2.losses(net, batch, seeded(0)).values()]
            assert waits.count == 0
            found += [*net(wave), *net(wave, 3)]
            found += probe.attention(net, wave).values()
            found += probe.of_model(net, net.front_end)(wave).values()
            if "eq" in net.class_tokens:
                assert key_profile(net, wave, (2, 5)).shape == (2, 3, 12)  # on the CPU
        ctx = types.SimpleNamespace()
        ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
        with torch.no_grad():
            found += [mt2.NTXent.forward(ctx, on_gpu(300, 8), 0.1, 64), mt2.NTXent.backward(ctx, on_gpu())[0]]
    assert {str(x.device) for x in found if x is not None} == {"cuda:0"}


# ---- Generated music -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def music():
    """-> waves [48, 2, 64000], labels, power per pitch class [48, 2, 126, 12] with C first."""
    waves, labels = SyntheticMusic(7).batch(48, 0)
    power = VQT().magnitude(waves.flatten(0, 1))[..., :96].square().unflatten(2, (8, 12)).sum(2)
    return waves, labels, power.roll(9, -1).unflatten(0, (48, 2))  # the first bin is an A


def test_same_seed_and_step_same_music_else_other_music():
    music = SyntheticMusic(3)
    first, labels = music.batch(2, 5)
    other = music.batch(2, 6)[0]
    again, same = music.batch(2, 5)
    assert torch.equal(first, again)
    assert torch.equal(first, SyntheticMusic(np.int64(3)).batch(2, np.int64(5))[0])
    assert all(torch.equal(labels[k].nan_to_num(-1), same[k].nan_to_num(-1)) for k in labels)
    assert min((first - x).abs().max() for x in (other, SyntheticMusic(4).batch(2, 5)[0])) > 0.1


def test_the_share_of_rich_tracks_is_the_callers(monkeypatch):
    music, seen = SyntheticMusic(3), []
    whole = music.track
    monkeypatch.setattr(music, "track", lambda rng, rich: seen.append(rich) or whole(rng, rich))
    for rich in (0, 1):
        music.batch(4, 0, rich)
    assert seen == 4 * [False] + 4 * [True]
    assert not torch.equal(SyntheticMusic(3).batch(1, 6)[0], SyntheticMusic(4).batch(1, 5)[0])


def test_a_track_has_its_level_lead_instrument_and_room():
    music, dry, tracks = SyntheticMusic(5), SyntheticMusic(5), []
    whole = music.track
    music.track = lambda *given: tracks.append(whole(*given)) or tracks[-1]
    dry.rooms.zero_()
    (waves, labels), (other, _) = music.batch(12, 0, 1), dry.batch(12, 0, 1)
    level, wet = torch.tensor([t.level for t in tracks]), [t.wet > 0 for t in tracks]
    for x in (waves, other):  # whose rooms are silent: what is heard is the sound itself
        assert_close(x.abs().amax(2), level[:, None].expand(-1, 2))
    assert [list(mt2.INSTRUMENTS)[i] for i in labels["instrument"]] == [t.names[0] for t in tracks]
    assert [not torch.allclose(x, y, atol=1e-3) for x, y in zip(waves, other)] == wet and len({*wet}) == 2


def test_music_and_its_labels_are_in_range(music):
    waves, labels, _ = music
    assert waves.shape == (48, 2, 64000) and waves.isfinite().all()
    assert waves.abs().max() <= 1 < 20 * waves.std()
    least, most = dict(tempo=60), dict(key=23, key_signature=11, instrument=9, chord=24, tempo=180)
    for name, highest in most.items():
        assert least.get(name, 0) <= labels[name].min() and labels[name].max() <= highest
        assert len(labels[name].unique()) > 5
    assert torch.equal(labels["key_signature"], (labels["key"] % 12 + 3 * (labels["key"] >= 12)) % 12)
    for times in (labels["beats"], labels["onsets"]):
        given = times[times.isfinite()]
        assert given.min() >= 0 and given.max() < 4 and times.isfinite().any(2).all()


@pytest.mark.parametrize("segment", [0, 1])
def test_both_segments_sound_in_the_labelled_key_signature(music, segment):
    _, labels, power = music
    total = power[:, segment].sum(1)
    turned = [x.roll(-int(k)) for x, k in zip(total / total.sum(1, keepdim=True), labels["key_signature"])]
    share = [sum(turned).roll(-shift)[[0, 2, 4, 5, 7, 9, 11]].sum().item() for shift in range(12)]
    assert np.argmax(share) == 0 and share[0] > 1.02 * sorted(share)[-2]  # a fifth away one tone differs


def test_the_segments_of_a_track_have_other_notes(music):
    waves, labels, _ = music
    chord = labels["chord"]
    assert ((chord[:, 0] != chord[:, 1]).any(1) | (chord[:, 0] == 24).all(1)).float().mean() > 0.9
    assert (waves[:, 0] - waves[:, 1]).abs().amax(1).min() > 0.1


def test_segments_begin_anywhere_within_a_beat(music):
    _, labels, _ = music
    phase = labels["beats"][..., 0] * labels["tempo"][:, None] / 60 % 1  # [48, 2]
    assert phase.min() < 0.1 and phase.max() > 0.9 and (phase[:, 0] - phase[:, 1]).abs().min() > 1e-4


@pytest.mark.parametrize("minor", [0, 1])
def test_every_chord_of_rich_music_is_a_major_or_a_minor_triad(minor):
    rng, rich = random.Random(0), types.SimpleNamespace(rich=True, minor=minor, tonic=3, per_chord=1)
    triads = {tuple(triad) for *_, triad in SyntheticMusic().harmony(rng, rich, 2000)}
    assert {((b - a) % 12, (c - a) % 12) for a, b, c in triads} == {(3, 7), (4, 7)} and len(triads) > 6


def test_easy_music_keeps_to_its_scale_rich_minor_raises_notes_and_chords_begin_anywhere():
    rng, t = random.Random(0), types.SimpleNamespace(rich=False, minor=1, tonic=3, per_chord=1)

    def raised():  # the degrees, from 0
        walk = SyntheticMusic().harmony(rng, t, 2000)
        return {tuple(i for i in range(7) if scale[i] - 3 != mt2.SCALES[1][i]) for _, _, scale, _ in walk}
    assert raised() == {()}
    t.rich = True
    assert raised() == {(), (6,), (5, 6), (2,), (5,)}  # leading tones; thirds of I and IV as dominants
    t.per_chord, harmony = 4, SyntheticMusic().harmony
    first = {[new for new, *_ in harmony(rng, t, 9)].index(True, 1) for _ in range(40)}
    assert first == {1, 2, 3, 4}  # beats left of the chord in which a segment begins


@pytest.mark.parametrize("minor", [0, 1])
def test_chord_labels_agree_with_the_sound(music, minor):
    _, labels, power = music
    mine = (labels["chord"] // 12 == minor) & (power.sum(3) > 0)
    frames, roots = power[mine], labels["chord"][mine] % 12
    frames = frames / frames.sum(1, keepdim=True)
    profile = frames.gather(1, (torch.arange(12) + roots[:, None]) % 12).mean(0)
    share = [profile.roll(-shift)[[0, 4 - minor, 7]].sum().item() for shift in range(12)]
    assert np.argmax(share) == 0 and share[0] > 1.2 * sorted(share)[-2]
    assert profile[4 - minor] > 1.5 * profile[3 + minor]  # the labelled third, not the other one


def test_beats_follow_the_tempo_and_sound_rises_at_onsets(music):
    waves, labels, _ = music
    gaps = labels["beats"].diff(dim=2) - 60 / labels["tempo"][:, None, None]
    assert gaps.isfinite().sum() > 400 and gaps.nan_to_num(0).abs().max() < 1e-4
    mel = mt2.FrontEnd()(waves.flatten(0, 1))[0].clamp_min(-60)  # dB
    rise = mel.diff(dim=1).clamp_min(0).mean(2)  # [96, 125]
    at = torch.zeros_like(rise, dtype=torch.bool)
    for row, seconds in zip(at, labels["onsets"].flatten(0, 1)):
        row[(seconds[seconds.isfinite()] * 31.25).long().clamp_max(124)] = True
    assert rise[at].mean() > 1.5 * rise[~at].mean()


def test_a_note_its_beat_and_its_chord_begin_when_labelled_and_legato_ends_it(monkeypatch):
    music, rng = SyntheticMusic(), random.Random(1)
    t = music.track(rng, False)
    vars(t).update(tempo=60, drums=0, hiss=0, legato=0.6, silent=0)
    chords = [(True, 0, [], [b % 12, (b + 4) % 12, (b + 7) % 12]) for b in range(5)]  # C major, C# major, ...
    monkeypatch.setattr(music, "harmony", lambda *_: chords)
    monkeypatch.setattr(music, "lines", lambda *_: ([(8, 60), (12, 60)], [], [], [], []))
    wave, chord, beats, onsets = music.segment(rng, t)
    sounds = np.abs(wave) > 0
    assert sounds.argmax() / 16000 == pytest.approx(onsets[0], abs=1e-3) and beats[1] == onsets[0]
    second = int(16000 * onsets[1])
    assert not sounds[second - 4800:second - 1].any() and sounds[second:second + 160].any()
    assert chord == [sum(beat <= frame * 0.032 for beat in beats) for frame in range(126)]
    t.texture = "solo"
    assert set(music.segment(rng, t)[1]) == {24} and not any(SyntheticMusic().lines(rng, t, chords[:0])[1:])


def test_drums_are_onsets_a_kick_and_a_snare_in_turns_between_hi_hats(monkeypatch):
    music, rng = SyntheticMusic(), random.Random(1)
    t = music.track(rng, False)
    vars(t).update(tempo=60, drums=1.0, hiss=0, silent=0)
    monkeypatch.setattr(music, "lines", lambda *_: ([], [], [], [], []))
    wave, _, _, onsets = music.segment(rng, t)
    onsets = np.array(onsets)[np.isfinite(onsets)]
    assert_close(torch.from_numpy(np.diff(onsets)), torch.full((len(onsets) - 1,), 0.5).double())
    hits = [wave[int(16000 * s) + 1:][:4000] for s in onsets[onsets < 3.7]]
    bass = [np.square(np.abs(np.fft.rfft(hit, 4000))[:26]).sum() for hit in hits]  # below 100 Hz
    power = [np.square(hit).sum() for hit in hits]
    tick = [round(4 * (s - onsets[0])) + 2 for s in onsets[onsets < 3.7]]  # the first at -early is not heard
    assert {n % 8 for n, x in zip(tick, bass) if x > max(bass) / 9} == {0}
    assert min(x for n, x in zip(tick, power) if n % 4 == 0) > 2 * max(
        x for n, x in zip(tick, power) if n % 4)


def test_instruments_have_the_partials_of_their_table():
    music, rng = SyntheticMusic(), random.Random(0)

    def strength(name):  # of each partial's place in the wavetable, one row a table
        return np.abs(np.fft.rfft(music.wavetables(rng, name, 48, 0), axis=1))
    organ, bells, voice, piano = map(strength, ("organ", "bells", "voice", "piano"))
    assert organ[0, 16] / organ[0, 8] == pytest.approx(1.8 * 2 ** -0.9, rel=1e-3)  # even harmonics
    assert bells[:, 44].sum() > 100 * bells[:, 40].sum()  # the fifth partial is stretched
    assert voice[0, 40] > voice[0, 8] * 5 ** -1.2 * 2  # a formant at 650 Hz
    assert piano[1, 8] < 1e-3 * piano[0, 8]  # what dies sooner is high
    assert piano[1, 24] == pytest.approx(2 * piano[0, 24], rel=1e-3)
    assert np.ptp(music.motion["voice"][0] - np.arange(128000) / 16000) == pytest.approx(0.012 / 35, rel=0.01)


def test_a_silent_start_has_no_onsets_no_beats_and_no_chord():
    waves, labels = SyntheticMusic(11).batch(64, 0)
    begin = (waves.abs().flatten(0, 1) > 1e-6).float().argmax(1) / 16000  # seconds
    late = begin > 0.2
    assert late.sum() >= 2
    for name in ("onsets", "beats"):
        assert (labels[name].flatten(0, 1).nan_to_num(9).amin(1) > begin - 0.01)[late].all()
    silent = torch.arange(126) * 512 / 16000 < begin[:, None] - 0.02
    assert (labels["chord"].flatten(0, 1)[silent & late[:, None]] == 24).all()


# ---- A folder of music -----------------------------------------------------------------------------------

USABLE = {"plain.wav": (16000, 1, 300), "räv ♪.flac": (44100, 2, 500), "with space/x.ogg": (22050, 1, 700),
          "odd.wav": (11127, 1, 900), "eight.wav": (8000, 8, 1100), "LOUD.WAV": (48000, 2, 1300),
          "high.flac": (192000, 1, 1700)}  # rate, channels, Hz of the tone in it
BROKEN = {"short.wav", "three samples.wav", "nan.wav", "infinite.wav", "silent.wav", "empty.wav", "text.mp3",
          "cut.flac", "dangling.ogg"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of seven usable files and of everything that can be wrong with others."""
    root = tmp_path_factory.mktemp("zoo")
    for name, (rate, channels, hertz) in USABLE.items():
        (root / name).parent.mkdir(exist_ok=True)
        soundfile.write(root / name, 0.5 * tone([hertz] * channels, 6, rate).T.numpy(), rate)
    for name, value, length in (("short", 1, 1000), ("three samples", 1, 3), ("nan", np.nan, 10 ** 5),
                                ("infinite", np.inf, 10 ** 5), ("silent", 0, 10 ** 5)):
        soundfile.write(root / f"{name}.wav", np.full(length, value, float), 16000, subtype="FLOAT")
    (root / "empty.wav").write_bytes(b"")
    (root / "text.mp3").write_text("la la la\n" * 1000)
    (root / "cut.flac").write_bytes((root / "high.flac").read_bytes()[:40_000])
    (root / "dangling.ogg").symlink_to(root / "nowhere.ogg")
    (root / "folder.wav").mkdir()
    (root / "notes.txt").write_text("not music")
    return root


def pitch_of(wave):
    return round(np.argmax(np.abs(np.fft.rfft(wave.numpy()))) / 4)  # Hz


def test_a_folder_gives_what_is_usable_and_names_the_rest(zoo):
    folder, heard = AudioFolder(zoo), set()
    for i, file in enumerate(folder.files):
        waves, name = folder.pair(i, seeded(i)), Path(file).relative_to(zoo).as_posix()
        assert waves.shape == (2, 64000) and waves.isfinite().all() and 0.4 < waves.abs().max() <= 1
        assert pitch_of(waves[0]) == pitch_of(waves[1]) == USABLE.get(name, (0, 0, pitch_of(waves[1])))[2]
        heard.add(pitch_of(waves[0]))
    assert heard == {hertz for _, _, hertz in USABLE.values()} and len(folder) == len(USABLE) + len(BROKEN)
    assert {os.path.basename(f) for f in folder.skipped} == BROKEN
    assert {os.path.basename(f) for f in folder.unopened} == {"text.mp3", "empty.wav"}
    mp3, before = [f for f in folder.files if f.endswith("text.mp3")][0], dict(folder.skipped)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError):  # it is not opened again
        patch.setattr(soundfile, "SoundFile", None)
        folder.read(mp3, 0, 0)
    assert folder.skipped == before
    assert all(reason and not {"\n", "/"} & {*reason} for reason in folder.skipped.values())  # no path twice


def test_the_same_generator_gives_the_same_segments_whatever_was_read_before(zoo):
    used = AudioFolder(zoo)
    for i in range(len(used)):
        used.pair(i, seeded(100 + i))  # now it knows every broken file
    for i in range(len(used)):
        assert torch.equal(used.pair(i, seeded(i)), AudioFolder(zoo).pair(i, seeded(i)))
    broken = [os.path.basename(f) for f in used.files].index("empty.wav")  # replaced by ever another one
    assert len({pitch_of(used.pair(broken, seeded(i))[0]) for i in range(12)}) > 2


def test_both_segments_lie_in_the_track_and_within_the_gap(tmp_path):
    clock = np.arange(20 * 8000) / 8000 / 20 * 0.9 + 0.05  # each sample tells its time
    soundfile.write(tmp_path / "clock.wav", clock, 8000, subtype="FLOAT")
    folder = AudioFolder(tmp_path, gap=3)
    starts = torch.stack([folder.pair(0, seeded(i))[:, 100] for i in range(60)]).sub(0.05) / 0.9 * 20
    gaps = starts[:, 1] - starts[:, 0]  # B may begin before or after A
    assert -0.1 < starts.min() < 2 and 14 < starts.max() < 16.1
    assert -3.1 < gaps.min() < -2 and 2 < gaps.max() < 3.1


def test_an_item_follows_the_random_state_of_torch(zoo):
    folder, items = AudioFolder(zoo), []
    index = [os.path.basename(f) for f in folder.files].index("plain.wav")
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        items.append(folder[index])
    assert torch.equal(items[0], items[1]) and not torch.equal(items[0], items[2])


def test_what_is_louder_than_full_scale_is_clipped(tmp_path):
    soundfile.write(tmp_path / "loud.wav", 5 * tone([100], 5)[0].numpy(), 16000, subtype="FLOAT")
    pair = AudioFolder(tmp_path)[0]
    assert pair.abs().max() == 1 and pair.dtype == torch.float32


def test_channels_are_mixed_to_mono(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.tile([0.2, 0.6], (80000, 1)), 16000, "FLOAT")
    for waves in (AudioFolder(tmp_path).pair(0, seeded(0)), probe.cut(tmp_path / "x.wav")[:1]):
        assert_close(waves, torch.full_like(waves, 0.4))


def test_half_an_mp3_is_read_and_said_to_be_cut(tmp_path, capsys):
    soundfile.write(tmp_path / "x.mp3", tone([440], 20)[0].numpy(), 16000)
    assert len(probe.cut(tmp_path / "x.mp3")) == 5 and not capsys.readouterr().err
    data = (tmp_path / "x.mp3").read_bytes()
    (tmp_path / "x.mp3").write_bytes(data[:len(data) // 2])
    assert 2 <= len(probe.cut(tmp_path / "x.mp3")) <= 3
    assert re.search(r"x.mp3: read (9|10) of 20 s; cut\?\n", capsys.readouterr().err)


def test_folders_that_may_not_be_read_are_named(songs, tmp_path, monkeypatch):
    def scan(path, scandir=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    (tmp_path / "closed").mkdir()
    shutil.copy(songs / "0.wav", tmp_path)
    monkeypatch.setattr(os, "scandir", scan)
    folder = AudioFolder(tmp_path)
    (name, why), = folder.skipped.items()
    assert len(folder) == 1 and name == str(tmp_path / "closed") and "Permission denied" in why
    for name, why in (("closed", "Permission denied"), ("0.wav", "Not a directory"), ("x", "No such file")):
        with pytest.raises(FileNotFoundError, match=f"{name}: no music here; name a folder of .wav, .*{why}"):
            AudioFolder(tmp_path / name)
    (tmp_path / "0.wav").write_text("words")
    with pytest.raises(RuntimeError, match="none of 1 files can be used; .*0.wav: not a sound"):
        AudioFolder(tmp_path).pair(0)  # not because of the folder


def test_silent_passages_lost_files_and_links_in_circles_do_no_harm_and_linked_folders_are_read(tmp_path):
    late = torch.cat([torch.zeros(5 * 16000), tone([440], 10)[0]]).numpy()
    root, album = tmp_path / "music", tmp_path / "album"
    for name in (root / "late.wav", album / "lost.wav"):
        name.parent.mkdir()
        soundfile.write(name, late, 16000)
    (root / "round").symlink_to(root)
    (root / "album").symlink_to(album)
    folder = AudioFolder(root)
    assert len(folder) == 2
    with pytest.raises(ValueError, match="silent where it was read"):  # one silent segment is enough
        folder.read(folder.files[1], 0.0, 0.99)
    (album / "lost.wav").unlink()
    assert {folder.pair(i % 2, seeded(i)).shape for i in range(20)} == {(2, 64000)}


def test_ten_thousand_files_are_listed_in_seconds_and_none_is_opened(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "0.wav", noise(64000).numpy(), 16000)
    for i in range(1, 10_000):
        os.link(tmp_path / "0.wav", tmp_path / f"{i}.wav")
    begin = time.perf_counter()
    with monkeypatch.context() as patch:
        patch.setattr(soundfile, "SoundFile", None)  # a call would raise
        folder = AudioFolder(tmp_path)
    assert len(folder) == 10_000 and time.perf_counter() - begin < 5
    assert folder.pair(9_999, seeded(0)).shape == (2, 64000) and not folder.skipped


def broken_copies(data, n, seed):
    """Copies of a file that were cut, or had bits flipped: near its head or anywhere."""
    dice = random.Random(seed)
    for i in range(n):
        copy = bytearray(data)
        if i % 3 == 0:
            del copy[dice.randrange(len(copy)):]
        for _ in range(dice.choice([1, 1, 3, 30]) if i % 3 else 0):
            copy[dice.randrange(64 if i % 3 == 1 else len(copy))] ^= 1 << dice.randrange(8)
        yield bytes(copy)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_broken_sound_gives_waves_or_one_line_and_never_hangs(kind, tmp_path):
    file, begin = tmp_path / f"x.{kind}", time.process_time()
    soundfile.write(file, 0.3 * tone([440], 0.4)[0].numpy() + 0.01 * noise(6400).numpy(), 16000)
    for i, data in enumerate(broken_copies(file.read_bytes(), 60, seed=1)):
        file.write_bytes(data)
        try:
            waves = AudioFolder(tmp_path, seconds=0.25).pair(0, seeded(i))
            assert waves.shape == (2, 4000) and waves.isfinite().all() and waves.abs().max() <= 1
        except RuntimeError as error:
            assert "\n" not in str(error) and str(file) in str(error)
    assert time.process_time() - begin < 60  # usually 3


# ---- The monitor -----------------------------------------------------------------------------------------

class Oracle:
    """A model that knows some waves' key signatures: its y rotates with the key and with the crop."""

    def __init__(self, waves, keys, turn=0):
        self.keys = {tuple(w[1000:1020].tolist()): int(k) for w, k in zip(waves.flatten(0, -2), keys)}
        self.turn = turn

    def pitch(self, waves, offsets=(8,)):
        key = torch.tensor([self.keys.get(tuple(w[1000:1020].tolist()), 0) for w in waves])
        return torch.stack([F.one_hot((key - c + self.turn) % 12, 12).float() for c in offsets])


@pytest.fixture(scope="module")
def known():
    """-> 36 tracks and their key signatures; these and the calibration's tracks, as an Oracle wants them."""
    (waves, labels), (more, theirs) = SyntheticMusic(21).batch(36, 0), SyntheticMusic(998).batch(64, 0)
    keys = torch.cat([x["key_signature"].repeat_interleave(2) for x in (labels, theirs)])
    return waves, labels["key_signature"], torch.cat([waves, more]), keys


@pytest.mark.parametrize("turn", [0, 5])
def test_a_perfect_y_gets_perfect_figures_and_its_key_is_read_whatever_its_rotation(turn, known):
    waves, truth, *known = known
    oracle = Oracle(*known, turn)
    figures = monitor(oracle, waves, truth)
    assert min(figures[k] for k in ("agree", "equivariance", "fork", "follows_key", "exact", "fifth")) > 0.999
    assert figures["follows_offset"] < 0.4 and "SHORTCUT" not in verdict(figures) and len(truth.unique()) > 10
    assert torch.equal(key_signature(key_profile(oracle, waves[:, 0])[0], calibrate(oracle)), truth)


def test_the_monitor_reads_keys_at_the_middle_crop_and_a_calibration_at_all_it_is_given(known):
    waves, truth, *known = known
    oracle = Oracle(*known)
    off = lambda *given: Oracle.pitch(oracle, *given).roll(3, -1)  # a minor third away at all other crops
    oracle.pitch = lambda w, offsets: torch.cat([(Oracle.pitch(oracle, w, [c]) if c == 8 else off(w, [c]))
                                                 for c in offsets])
    figures = monitor(oracle, waves, truth)
    assert figures["agree"] > 0.999 and figures["exact"] == 1 and figures["equivariance"] < 0.9
    assert_close(calibrate(oracle, "cpu", (8, 9)), (torch.eye(12)[0] + torch.eye(12)[3]) / 2)


@pytest.mark.parametrize("fifths", [0.6, -0.6])
def test_between_two_keys_by_phase_the_rest_of_y_decides(fifths):
    in_c = torch.tensor([0.3, 0, 0, 0, 0, 0, 0, 0.3, 0, 0.4, 0, 0])  # on C, G and A
    spectrum = torch.fft.rfft(in_c)
    spectrum[5] *= np.exp(2j * math.pi / 12 * fifths)  # 5 is -7: by phase alone a fifth away is nearer
    y = torch.stack([torch.fft.irfft(spectrum, 12).roll(tonic) for tonic in range(12)])
    turned = (mt2.key_phase(y[0]) / mt2.key_phase(in_c)).angle().item()
    assert turned == pytest.approx(-math.pi / 6 * fifths, abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # a user's
        assert key_signature(y, in_c).tolist() == list(range(12))
        many = torch.rand(2000, 12, generator=seeded(0))
        rounded = key_signature(many, in_c)
    assert torch.equal(rounded, key_signature(many, in_c))


@pytest.mark.parametrize("away, fifth", [(7, 1), (5, 1), (2, 0)])
def test_a_key_a_fifth_away_on_either_side_is_not_exact_but_within_a_fifth(away, fifth, known):
    waves, truth, heard, keys = known
    keys = torch.cat([(keys[:72] + away) % 12, keys[72:]])  # 72: of the calibration's tracks, right
    figures = monitor(Oracle(heard, keys), waves, truth)
    assert (figures["exact"], figures["fifth"]) == (0, fifth)


def test_figures_count_both_segments_and_every_key_alike(known):
    waves, truth, heard, keys = known
    keys = keys.clone()
    keys[1:72:2] = (keys[1:72:2] + 2) % 12  # segments B, two fifths above A: between them lies one
    oracle = Oracle(heard, keys)
    soft = lambda y: 0.4 * y + 0.3 * y.roll(7, -1) + 0.3 * y.roll(-7, -1)  # so that its neighbours add up
    oracle.pitch = lambda *given: soft(Oracle.pitch(oracle, *given))
    figures = monitor(oracle, waves, truth)
    assert figures["agree"] == pytest.approx(0.5, abs=0.05)
    assert figures["exact"] < 0.1 and figures["fifth"] > 0.9
    often = torch.cat([torch.arange(36), torch.zeros(60, dtype=torch.long)])  # one key dominates
    found = monitor(Oracle(heard, known[3]), waves[often], truth[often])["follows_offset"]
    assert found == pytest.approx(mt2.key_phase(torch.eye(12))[truth.unique()].mean().abs().item(), abs=1e-4)


def test_a_y_that_stands_still_or_follows_the_crop_alone_is_called_a_shortcut_and_nan_is_not_praised(known):
    crop_only, still = Oracle(known[2][:0], []), Oracle(known[2][:0], [])
    still.pitch = lambda waves, offsets=(8,): torch.eye(12)[[3]].expand(len(offsets), len(waves), 12)
    crop_only, still = (monitor(oracle, *known[:2]) for oracle in (crop_only, still))
    assert crop_only["follows_offset"] > 0.999 and still["fork"] < 0.3 and still["equivariance"] < 0.3
    for figures in (crop_only, still, dict.fromkeys(mt2.MONITOR, math.nan)):
        assert "SHORTCUT" in verdict(figures)


def test_the_verdict_depends_on_fork_equivariance_and_offset():
    good = dict(equivariance=0.95, fork=0.95, follows_offset=0.1, exact=0.8, fifth=0.9)
    assert "y rotates" in verdict(good) and verdict(good).endswith("key signature 0.80, 0.90 within a fifth")
    for name in ("fork", "equivariance"):
        assert "begins to rotate" in verdict(good | {name: 0.6}) and "SHORTCUT" in verdict(good | {name: 0.4})
    assert "SHORTCUT" in verdict(good | {"follows_offset": 0.4})
    unknown = good | {"exact": math.nan, "fifth": math.nan}  # a folder of music has no labels
    assert verdict(unknown).endswith("offset alone 0.10)")
    assert "few keys" in verdict(unknown | {"fork": 0.4}) and "few keys" not in verdict(good | {"fork": 0.4})


# ---- The loop --------------------------------------------------------------------------------------------

def log_of(run):
    """log.csv without its last column, the speed; all lines whole, all steps there, none twice."""
    header, *rows = (Path(run) / "log.csv").read_text().splitlines()
    assert header == "step,loss,nt_xent,cpsd,lr,tracks_per_s"
    rows = np.array([[float(x) for x in row.split(",")] for row in rows])
    assert rows.shape[1] == 6 and rows[:, 0].tolist() == list(range(1, len(rows) + 1))
    return rows[:, :5]


def weights(run):
    return torch.load(Path(run) / "model.pt", weights_only=True)["model"]


def assert_equal_runs(run, other):
    np.testing.assert_allclose(log_of(run), log_of(other), rtol=1e-5, atol=1e-6)
    assert_close(weights(run), weights(other), rtol=1e-5, atol=1e-6)
    assert (run / "monitor.csv").read_text() == (other / "monitor.csv").read_text()
    assert set(files_of(run)) == {"model.pt", "state.pt", "log.csv", "monitor.csv"}


def files_of(folder):
    return {f.name: f.read_bytes() for f in Path(folder).iterdir()}


def at_step(patch, change):
    """Calls change(n, batch) before the n-th loss from now: it may raise, kill, or return another batch."""
    real, calls = mt2.losses, []

    def losses(net, batch, *rest):
        calls.append(1)
        return real(net, change(len(calls), batch) or batch, *rest)
    patch.setattr(mt2, "losses", losses)


def interrupted(config, step, error=KeyboardInterrupt):
    """Train until an exception before the n-th loss."""
    def change(n, batch):
        if n == step:
            raise error
    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        at_step(patch, change)
        train(config)


def nan_at(*steps):
    return lambda n, batch: [x * math.nan for x in batch] if n in steps else None


def python(*args, **more):
    """Start another Python that finds mt2; -> the process."""
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen([sys.executable, *map(str, args)], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of 8 steps, saved after 3, 6 and 8."""
    return train(tiny(tmp_path_factory.mktemp("runs") / "unbroken"))


@pytest.mark.parametrize("more", [*(dict(tasks=tasks, inputs=inputs) for tasks, inputs in VALID),
                                  dict(encoder="tune", expansion=0, batch=2)])
def test_every_valid_model_trains_and_loads(more, tmp_path):
    config = tiny(tmp_path, steps=1, **more)
    log = log_of(train(config))[0]
    assert np.isfinite(log[1:4]).tolist() == [True, "con" in config.tasks, "eq" in config.tasks]
    assert load(tmp_path).config == config


def test_the_logs_say_what_happened(unbroken):
    log, c = log_of(unbroken), tiny()
    np.testing.assert_allclose(log[:, 1], log[:, 2] + 10 * log[:, 3], rtol=1e-4)
    np.testing.assert_allclose(log[:, 4], [mt2.learning_rate(i, c) for i in range(8)], rtol=1e-4)
    watched = [row.split(",")[0] for row in (unbroken / "monitor.csv").read_text().splitlines()]
    assert watched == ["step", "3", "6", "8"]


def test_the_learning_rate_rises_then_falls():
    rates = [mt2.learning_rate(i, Config(steps=1000, warmup=50, lr=1.0)) for i in range(1000)]
    assert 0.01 < rates[0] < 0.03 and 45 <= np.argmax(rates) <= 50 and max(rates) > 0.98
    assert 0.045 < rates[-1] < 0.055 and np.all(np.diff(rates[50:]) < 0)


def test_adamw_gets_the_published_betas_the_logged_rate_and_decay_on_a_cosine(tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *given: seen.extend(
        (*g["betas"], g["lr"], g["weight_decay"]) for g in self.param_groups) or step(self, *given))
    rates = log_of(train(tiny(tmp_path, tasks="con")))[:, 4]
    decay = [0.04, 0.03886, 0.03561, 0.03074, 0.025, 0.01926, 0.01439, 0.01114]  # from 0.04 to 0.01
    np.testing.assert_allclose(seen[::2], [(0.9, 0.98, lr, d) for lr, d in zip(rates, decay)], rtol=1e-3)
    np.testing.assert_allclose(seen[1::2], [(0.9, 0.98, lr, 0) for lr in rates], rtol=1e-3)


def test_cpsd_has_the_weight_of_its_flag_and_gradients_are_cut_to_a_norm_of_1(tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *given: seen.extend(
        p.grad.square().sum() for g in self.param_groups for p in g["params"]) or step(self, *given))
    (_, loss, nt, eq, _), = log_of(train(tiny(tmp_path, steps=1, eq_weight=100)))
    assert loss == pytest.approx(nt + 100 * eq, rel=1e-4)
    assert sum(seen) == pytest.approx(1, rel=1e-3)


def test_a_saved_model_loads_as_it_was_and_may_start_another_run(unbroken, tmp_path):
    net = load(unbroken)
    assert not net.training and load(unbroken / "model.pt")(noise(1, 64000)).y.isfinite().all()
    assert all(torch.equal(value, weights(unbroken)[name]) for name, value in net.state_dict().items())
    assert not any(name.startswith("front_end.vqt") for name in net.state_dict())  # it is computed anew
    assert load(unbroken, "meta").cls.is_meta  # on the device that was asked for
    run = train(tiny(tmp_path / "next", init=str(unbroken), steps=1, lr=1e-9))
    assert_close(dict(load(run).named_parameters()), dict(net.named_parameters()), rtol=1e-4, atol=1e-6)
    nothing = tmp_path / "nothing"
    for path in (nothing, nothing / "model.pt"):  # the remedy makes what was asked for
        with pytest.raises(FileNotFoundError, match=f"no such checkpoint.* --out {nothing}$"):
            load(path)
    (tmp_path / "v1.pt").mkdir()
    shutil.copy(unbroken / "model.pt", tmp_path / "v1.pt")
    assert load(tmp_path / "v1.pt").config == net.config  # a run folder may have such a name


def test_same_seed_same_run_other_seed_other_run_and_a_finished_run_is_left_alone(
        unbroken, tmp_path, capsys):
    run, before = train(tiny(tmp_path / "same")), files_of(unbroken)
    assert_equal_runs(run, unbroken)
    assert abs(log_of(train(tiny(tmp_path / "other", seed=1, steps=1)))[0, 1] - log_of(run)[0, 1]) > 1e-3
    capsys.readouterr()
    assert train(tiny(unbroken)) == unbroken and files_of(unbroken) == before
    assert capsys.readouterr().out == f"{unbroken}: already trained for all of its 8 steps\n"
    (run / "model.pt").unlink()  # as after a kill before it was ever written
    train(tiny(run))
    assert_equal_runs(run, unbroken)


@pytest.mark.parametrize("step", [3, 5, 8])
def test_a_run_that_died_goes_on_as_if_unbroken(step, unbroken, tmp_path):
    interrupted(tiny(tmp_path), step)
    assert_equal_runs(train(tiny(tmp_path)), unbroken)


KILLED = FEW + """
import json, os, sys
count, replace = [], os.replace
def kill(*args):
    count.append(1)
    if len(count) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    replace(*args)
os.replace = kill
mt2.train(mt2.Config(**json.loads(sys.argv[1])))
"""


def test_kill_9_during_a_save_leaves_a_run_that_goes_on_as_if_unbroken(unbroken, tmp_path):
    moments = (1, 2, 6)  # os.replace puts two files in place per save
    runs = [python("-c", KILLED, json.dumps(TINY | {"out": str(tmp_path / str(i))}), i) for i in moments]
    for i, run in zip(moments, runs):
        run.communicate(timeout=100)
        assert run.returncode == -signal.SIGKILL
        assert_equal_runs(train(tiny(tmp_path / str(i))), unbroken)


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """A folder of five good files and three that are not."""
    root = tmp_path_factory.mktemp("songs")
    for i in range(5):
        soundfile.write(root / f"{i}.wav", 0.3 * tone([200 * (i + 1)], 5 + i)[0].numpy(), 16000)
    soundfile.write(root / "2b nan.wav", np.full(90000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(root / "3b silent.wav", np.zeros(90000), 16000)
    (root / "4b text.ogg").write_text("words")
    return root


def test_seeds_and_ranks_draw_other_music_other_segments_of_a_folder_and_other_views(songs):
    configs = [tiny(data=str(songs), easy=0, seed=seed) for seed in (0, 0, 1)]
    streams = [mt2.Stream(config, rank) for config, rank in zip(configs, (0, 1, 0))]
    draws = [stream.generator(7).get_state() for stream in streams]
    chunks = [stream[7][0][0] for stream in streams]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(draws[i], draws[j]) and not torch.equal(chunks[i], chunks[j])
    assert torch.equal(mt2.Stream(configs[1], 1)[7][0][0], chunks[1])
    assert len({stream.music.seed for stream in streams}) == 3
    assert not torch.equal(streams[0].generator(8).get_state(), draws[1])


def test_music_is_easy_then_ever_richer_then_the_folders(songs, monkeypatch):
    stream, seen = mt2.Stream(tiny(data=str(songs), easy=0.2, generated=0, steps=100, gap=7)), []
    assert stream.folder.gap == 7 and stream.music.seed >= 4096  # seeds below are never trained on
    silence = lambda n, step, rich: seen.append((step, rich)) or (torch.zeros(n, 2, 64000), {})
    monkeypatch.setattr(stream.music, "batch", silence)
    for i in (0, 19, 30, 39, 40, 99):
        stream[i]
    np.testing.assert_allclose(seen, [(0, 0), (19, 0), (30, 0.5), (39, 0.95)])
    assert not torch.equal(stream.generator(7).get_state(), stream.generator(8).get_state())


def test_a_run_from_a_model_needs_no_easy_music(songs, monkeypatch):
    stream, seen = mt2.Stream(tiny(init="x", easy=0.4, steps=100)), []
    silence = lambda n, step, rich: seen.append(rich) or (torch.zeros(n, 2, 64000), {})
    monkeypatch.setattr(stream.music, "batch", silence)
    stream[0]
    assert seen == [1]
    stream.folder = AudioFolder(songs)
    assert stream[0][0][0].amax() > -100 and seen == [1, 1]  # the folder from the start, beside rich music


def test_a_worker_that_starts_anew_as_on_macos_and_windows_makes_the_same_music(songs):
    stream = mt2.Stream(tiny(data=str(songs), easy=0))
    sent = pickle.loads(pickle.dumps(stream))
    assert all(torch.equal(x, y) for i in (0, 9) for x, y in zip(stream[i][0], sent[i][0]))


@pytest.mark.parametrize("share, files", [(0, 5), (0.5, 3), (0.9, 1)])
def test_beside_a_folder_a_share_of_generated_music_stays(share, files, songs, monkeypatch):
    stream = mt2.Stream(tiny(data=str(songs), easy=0, generated=share, fresh=5, pool=20))
    monkeypatch.setattr(stream.music, "batch", lambda n, step, rich: (torch.zeros(n, 2, 64000), {}))
    (mel, vqt), _ = stream[3]
    assert mel.shape[:2] == vqt.shape[:2] == (5, 2)
    assert mel.flatten(1).amax(1).gt(-160).tolist() == [True] * files + [False] * (5 - files)
    assert (mel[0, 0] != mel[0, 1]).any()  # A and B of one track


def test_a_run_on_a_folder_that_died_goes_on_as_if_unbroken_with_or_without_workers(songs, tmp_path, capsys):
    settings = dict(data=str(songs), easy=0, generated=0.3, tasks="con")
    whole = train(tiny(tmp_path / "whole", workers=0, **settings))
    said = "".join(capsys.readouterr())
    for name in ("nan.wav", "silent.wav", "text.ogg"):  # not the first alone
        assert len(re.findall(rf"skipped .*{name} \(", said)) == 1
    assert "step 8: skipped 3 files so far" in said
    for workers in (0, 2):
        config = tiny(tmp_path / str(workers), workers=workers, **settings)
        interrupted(config, 6)
        assert_equal_runs(train(config), whole)


def test_of_many_bad_files_three_are_named_and_all_are_counted(songs, tmp_path, capsys):
    shutil.copy(songs / "0.wav", tmp_path)
    for i in range(1, 9):
        (tmp_path / f"{i}.wav").write_text("words")
    train(tiny(tmp_path / "run", data=str(tmp_path), easy=0, tasks="con"))
    said = "".join(capsys.readouterr())
    assert len(re.findall(r"skipped \S+wav \(", said)) == 3 and "step 8: skipped 8 files so far" in said
    assert said.count("files so far") == 3  # at every save


def test_kill_9_at_random_moments_costs_nothing(songs, tmp_path):
    more = dict(data=str(songs), easy=0.2, steps=24, workers=1, tasks="con")  # con: no monitor, so quick
    whole, log = train(tiny(tmp_path / "whole", **more)), tmp_path / "run" / "log.csv"
    flags = [f"--{name}={value}" for name, value in more.items()]
    for rows in (1, 13, 99):  # killed a random moment after so many rows of the log; at last not at all
        run = python(HERE / "mt2.py", *FLAGS, *flags, cwd=tmp_path)
        while run.poll() is None and (not log.exists() or log.read_text().count("\n") <= rows):
            time.sleep(0.01)
        time.sleep(random.Random(rows).random() / 20)
        run.kill()
        run.wait(timeout=60)  # not for its worker, which looks for its parent every five seconds
    np.testing.assert_allclose(log_of(tmp_path / "run"), log_of(whole), rtol=1e-5, atol=1e-6)
    assert_close(weights(tmp_path / "run"), weights(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_a_run_and_its_workers_with_a_word_and_the_save_before_stands(workers, tmp_path):
    flags = [*FLAGS, "--steps=100000", "--save-every=20", f"--workers={workers}", "--tasks=con"]
    job = python(HERE / "mt2.py", *flags, cwd=tmp_path, start_new_session=True)
    while job.poll() is None and not (tmp_path / "run" / "model.pt").exists():
        time.sleep(0.05)
    while job.poll() is None:  # Python itself loses what arrives in a destructor: press again
        os.killpg(job.pid, signal.SIGINT)  # as a terminal does
        time.sleep(2)
    said, errors = job.communicate(timeout=2)  # a worker that lived on would hold the pipes
    # a worker that was handing music over may add a traceback of its own
    assert job.returncode == -signal.SIGINT and "at chance" in said, errors
    assert "\nmt2: stopped; the same command goes on from the last save\n" in errors, errors
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] % 20 == 0


def test_workers_leave_ctrl_c_to_the_loop(tmp_path):
    _, chunks = mt2.music_stream(tiny(tmp_path, workers=2), 0, torch.device("cpu"), 0, 20)
    next(chunks), next(chunks)  # one of each: both are at work
    for worker in chunks._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(chunks)) == 18


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch's own watch ends workers, after seconds")
def test_workers_end_at_once_with_a_loop_that_is_killed():
    loop = ("import os, torch, mt2; config = mt2.Config(workers=2, fresh=2)\n"
            "chunks = mt2.music_stream(config, 0, torch.device('cpu'), 0, 1000)[1]; next(chunks)\n"
            "print(*(w.pid for w in chunks._workers), flush=True); os.kill(os.getpid(), 9)")
    job = python("-c", loop, cwd=HERE)
    workers = [Path("/proc", pid, "stat") for pid in job.stdout.readline().split()]
    job.wait()

    def ended(stat):
        with contextlib.suppress(OSError):  # gone
            return stat.read_text().rsplit(")")[-1].split()[0] == "Z"
        return True
    begin = time.time()
    while not all(map(ended, workers)) and time.time() < begin + 3:
        time.sleep(0.05)
    assert len(workers) == 2 and all(map(ended, workers))


def test_a_folder_where_another_run_is_at_work_is_refused(tmp_path):
    log = str(tmp_path / "log.csv")
    hold = f"import fcntl, sys; f = open({log!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    other = subprocess.Popen([sys.executable, "-c", hold + "print(flush=True); sys.stdin.read()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match="another run is writing here"):
        train(tiny(tmp_path, tasks="con"))
    other.kill()  # however it ends
    other.communicate()
    assert len(log_of(train(tiny(tmp_path, tasks="con")))) == tiny().steps


def test_auto_is_this_process_s_gpu_or_else_the_cpu_and_other_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for gpu, auto, refused in ((False, "cpu", ("cuda", "mps")), (True, "cuda:1", ("mps", "tpu"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        assert str(mt2.pick_device("auto")) == auto and mt2.pick_device("cpu") == torch.device("cpu")
        for name in refused:
            with pytest.raises(ValueError, match=f"--device {name}: mt2 can use"):
                mt2.pick_device(name)


def test_processes_that_see_different_saves_do_not_train(tmp_path, monkeypatch):
    monkeypatch.setattr(mt2, "gather", lambda done: torch.cat([done, done + 3]))  # as with a disk each
    with pytest.raises(ValueError, match="folder that all machines share"):
        train(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_config_holds_plain_values_which_a_checkpoint_may_hold(tmp_path):
    config = Config(out=tmp_path, init=Path("x"), lr=np.float32(1e-3), batch=np.int64(4), tasks=["eq", "con"])
    kinds = {f.name: f.type for f in dataclasses.fields(Config)}
    assert all(type(value) is kinds[name] for name, value in dataclasses.asdict(config).items())
    for odd in (dict(frames=5.5), dict(steps="5"), dict(lr="fast"), dict(steps=math.inf), dict(seed=None),
                dict(data=None)):
        with pytest.raises(ValueError, match=f"--{[*odd][0]} .*must be (int|float|str)"):
            Config(**odd)
    with pytest.raises(ValueError, match="--tasks eq: waveform encoders learn con alone"):
        Config(encoder="tune", tasks="eq")
    assert Config(encoder="tune").tasks == ("con",)


def test_somebody_elses_log_is_refused_and_untouched(tmp_path):
    (tmp_path / "log.csv").write_text("my,own\n1,2\n")
    with pytest.raises(ValueError, match="log.csv: not a log of mt2"):
        train(tiny(tmp_path))
    assert (tmp_path / "log.csv").read_text() == "my,own\n1,2\n"


def test_a_log_is_cut_back_to_whole_rows_up_to_the_last_save(tmp_path):
    head, kept = "step,loss\n", "step,loss\n9,0.5\n10,0.4\n"
    broken = ("", "11", "11,0.3", "10\n", "12,0.2\n", "\0\0\n11,0.3\n")  # 11 is the last save
    for text, left in (("", head), (kept + "11,\n", kept + "11,\n"), *((kept + x, kept) for x in broken)):
        (tmp_path / "log.csv").write_text(text)
        mt2.open_log(tmp_path / "log.csv", ("step", "loss"), 11).close()
        assert (tmp_path / "log.csv").read_text() == left, text


@pytest.mark.parametrize("heads, dim", [(4, 24), (2, 48)])
def test_init_from_a_model_of_another_shape_is_refused(heads, dim, unbroken, tmp_path):
    with pytest.raises(ValueError, match=f"--init {re.escape(str(unbroken))}: a model of another shape"):
        train(tiny(tmp_path, init=str(unbroken), heads=heads, dim=dim))


@pytest.mark.parametrize("name, other", [("lr", 0.5), ("steps", 9), ("dim", 48), ("tasks", "eq"),
                                         ("data", ".")])
def test_a_folder_with_another_run_is_refused_with_both_values_and_untouched(name, other, unbroken):
    before, theirs, mine = files_of(unbroken), getattr(tiny(), name), getattr(tiny(**{name: other}), name)
    with pytest.raises(ValueError, match=name) as error:
        train(tiny(unbroken, **{name: other}))
    assert all(str(part) in str(error.value) for part in (unbroken, theirs, mine))
    assert files_of(unbroken) == before


def test_what_does_not_change_the_result_may_differ_and_a_model_alone_is_not_overwritten(
        unbroken, songs, tmp_path):
    for more in (dict(workers=3), dict(save_every=2), dict(compile=1), dict(device="auto")):
        assert mt2.resume(tiny(unbroken, **more), unbroken)["step"] == 8
    (tmp_path / "model.pt").write_bytes((unbroken / "model.pt").read_bytes())
    with pytest.raises(ValueError, match="holds model.pt but no state.pt"):
        train(tiny(tmp_path))
    run = train(tiny(tmp_path / "next", init=str(unbroken), data=str(songs), steps=1))
    assert mt2.resume(tiny(run, init=f"{unbroken}/", data=f"{songs}/", steps=1), run)["step"] == 1
    with pytest.raises(ValueError, match="holds a run with data = .*songs"):
        mt2.resume(tiny(run, init=str(unbroken), data=str(tmp_path), steps=1), run)


class Hostile:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def foreign(kind, unbroken, trap):
    """What somebody may find in a checkpoint's place."""
    good, file = (unbroken / "state.pt").read_bytes(), trap.with_name("x")
    content = {"config": dataclasses.asdict(tiny()), "model": Hostile(trap), "optimizer": {}, "step": 3}
    if kind == "hostile pickle":
        return pickle.dumps(content, protocol=2)
    if kind in ("hostile zip", "other model"):
        torch.save(content | ({"model": model(dim=48).state_dict()} if kind == "other model" else {}), file)
        return file.read_bytes()
    return {"cut": good[:len(good) // 2], "empty": b"", "text": b"hello", "zeros": bytes(len(good)),
            "model.pt": (unbroken / "model.pt").read_bytes()}[kind]


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "zeros", "model.pt", "other model", "hostile zip",
                                  "hostile pickle"])
def test_a_foreign_checkpoint_is_refused_by_name_kept_and_nothing_in_it_runs(kind, unbroken, tmp_path):
    trap, run = tmp_path / "trap", tmp_path / "run"
    data = foreign(kind, unbroken, trap)
    for name, use in (("state.pt", lambda: train(tiny(run))), ("model.pt", lambda: load(run))):
        if name == kind:
            continue
        run.mkdir(exist_ok=True)
        (run / name).write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(str(run / name))) as error:
            use()
        assert "\n" not in str(error.value) and not trap.exists()
        assert files_of(run) == {name: data}  # no call trains over it
        (run / name).unlink()


@pytest.mark.parametrize("spoil", [
    lambda s: s.update(step=-3), lambda s: s.update(step=3.0), lambda s: s.update(step=10 ** 9),
    lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),  # AdamW would write beyond its end
    lambda s: s["optimizer"]["state"][0].update(exp_avg="x"),
    lambda s: s["optimizer"]["state"][0]["exp_avg_sq"].fill_(math.nan),
    lambda s: s["optimizer"]["state"][0].update(step=torch.tensor(-1.0)),
    lambda s: s["model"]["cls"].fill_(math.inf)])
def test_a_state_with_content_that_cannot_be_is_refused(spoil, tmp_path):
    interrupted(tiny(tmp_path), 4)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    spoil(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt: .*; name another folder"):
        train(tiny(tmp_path))


@pytest.mark.parametrize("more", [{}, dict(encoder="tune", batch=2, fresh=2)])
def test_weight_decay_is_for_matrices_only(more, tmp_path, monkeypatch):
    groups = []
    adamw = lambda params, **how: groups.extend(params) or torch.optim.SGD(params, lr=0.0)
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    train(tiny(tmp_path, steps=1, **more))
    kinds = torch.nn.Linear, torch.nn.Conv1d, torch.nn.ConvTranspose1d
    net = mt2.build(tiny(tmp_path, **more))
    shapes = lambda params: sorted(tuple(p.shape) for p in params)
    matrices = [m.weight for m in net.modules() if isinstance(m, kinds)]
    assert shapes(groups[0]["params"]) == shapes(matrices) and groups[1]["weight_decay"] == 0
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len([*net.parameters()])


def test_options_in_a_state_do_not_replace_those_of_the_optimizer(unbroken, tmp_path):
    interrupted(tiny(tmp_path), 4)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["optimizer"]["param_groups"][0].update(amsgrad=True, betas="x")
    torch.save(state, tmp_path / "state.pt")
    assert_equal_runs(train(tiny(tmp_path)), unbroken)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_sound_state_is_not_blamed_when_the_device_fails(error, unbroken, tmp_path, monkeypatch):
    interrupted(tiny(tmp_path), 4)

    def fail(*_):
        raise error("full, or lost")
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", fail)
    with pytest.raises(error):
        train(tiny(tmp_path))


def test_broken_copies_of_a_model_load_or_are_refused_in_one_line(unbroken, tmp_path):
    for data in broken_copies((unbroken / "model.pt").read_bytes(), 80, seed=3):
        (tmp_path / "model.pt").write_bytes(data)
        try:
            assert_close(load(tmp_path).state_dict(), load(unbroken).state_dict(), rtol=0, atol=0)
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)


def test_a_flipped_bit_in_the_weights_is_noticed(unbroken, tmp_path):
    data, w = bytearray((unbroken / "model.pt").read_bytes()), load(unbroken).blocks[0].qkv.weight
    data[data.index(w.detach().numpy().tobytes()) + 1] ^= 1
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(ValueError, match="model.pt: .*checksums are wrong"):
        load(tmp_path)


@pytest.mark.parametrize("size", [dict(dim=30000, heads=1), dict(depth=1000)])
def test_a_config_of_more_weights_than_its_file_holds_is_refused_before_they_fill_the_memory(
        size, unbroken, tmp_path, monkeypatch):
    content = torch.load(unbroken / "model.pt", weights_only=True)
    content["config"].update(size)
    torch.save(content, tmp_path / "model.pt")
    monkeypatch.setattr(mt2, "build", None)
    with pytest.raises(ValueError, match="model.pt: .*asks for more weights than it holds"):
        load(tmp_path)


def disk_full(*args):
    if len(args) == 2 and hasattr(args[1], "write"):  # torch.save: something has been written already
        args[1].write(b"half")
    raise OSError(28, "No space left on device")


def test_a_save_that_no_longer_fits_says_why_and_leaves_the_one_before(tmp_path):
    resource = pytest.importorskip("resource")
    mt2.save(tmp_path / "a.pt", {"x": 1})
    before, limits = files_of(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a disk that fills while it writes
        with pytest.raises(OSError, match=r"a\.pt: cannot save \(.*File too large"):
            mt2.save(tmp_path / "a.pt", {"x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("what", ["torch.save", "os.replace", "os.fsync"])
def test_a_full_disk_leaves_the_last_save(what, unbroken, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        saved = {}

        def fill(n, batch):
            if n == 5:
                saved.update({k: v for k, v in files_of(tmp_path).items() if k.endswith(".pt")})
                patch.setattr(f"mt2.{what}", disk_full)
        at_step(patch, fill)
        with pytest.raises(OSError, match=r"\.pt: .*No space left.*$"):
            train(tiny(tmp_path))
    assert {k: v for k, v in files_of(tmp_path).items() if not k.endswith(".csv")} == saved
    assert_equal_runs(train(tiny(tmp_path)), unbroken)


def test_ctrl_c_during_a_save_is_ctrl_c_and_leaves_the_save_before(tmp_path, monkeypatch):
    mt2.save(tmp_path / "a.pt", {"x": 1})
    before, presses = (tmp_path / "a.pt").read_bytes(), [KeyboardInterrupt()]

    class File(io.FileIO):
        def write(self, data):
            if presses and len(data) > 10_000:  # once, amid a tensor; torch then fails to finish its file
                raise presses.pop()
            return super().write(data)
    monkeypatch.setattr(mt2, "open", File, raising=False)
    with pytest.raises(KeyboardInterrupt):
        mt2.save(tmp_path / "a.pt", {"x": torch.zeros(10_000)})
    assert (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.parametrize("more", [{}, dict(encoder="tune", expansion=0, batch=2)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_said(more, tmp_path, capsys):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, nan_at(3))
        real = mt2.losses
        patch.setattr(mt2, "losses", lambda net, *rest: seen.append(
            torch.cat([x.flatten() for x in net.state_dict().values()])) or real(net, *rest))
        run = train(tiny(tmp_path, steps=4, save_every=1, **more))
    terms = "nt_xent" if more else "nt_xent, cpsd"
    said = "".join(capsys.readouterr())
    assert f"step 3: {terms} is not finite, update skipped (1 in a row)" in said and len(log_of(run)) == 4
    before, third, after = seen[1:]  # before the second, third and fourth step
    assert torch.equal(third, after) and not torch.equal(before, third)


def test_a_run_that_ends_on_a_broken_step_keeps_the_save_before_and_says_so(tmp_path):
    interrupted(tiny(tmp_path / "cut", steps=3, save_every=1), 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError, match="saves stand"):
        at_step(patch, nan_at(3))
        train(tiny(tmp_path / "nan", steps=3, save_every=1))
    assert torch.load(tmp_path / "nan" / "state.pt", weights_only=True)["step"] == 2
    assert_close(weights(tmp_path / "nan"), weights(tmp_path / "cut"), rtol=0, atol=0)


def test_a_script_may_have_started_its_processes_itself(unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    mt2.dist.init_process_group("gloo", store=mt2.dist.HashStore(), rank=0, world_size=1)
    try:
        assert_equal_runs(train(tiny(tmp_path / "run")), unbroken)
    finally:
        mt2.dist.destroy_process_group()


def test_a_gradient_that_is_not_finite_is_told_from_a_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mt2.nn.utils, "clip_grad_norm_", lambda *given: torch.tensor(math.inf))
    with pytest.raises(FloatingPointError):
        train(tiny(tmp_path, steps=1))
    assert "step 1: the gradient is not finite" in capsys.readouterr().out


def test_ten_broken_steps_in_a_row_stop_the_run_with_a_good_save(tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError, match="10 bad updates"):
        at_step(patch, nan_at(2, *range(7, 30)))
        train(tiny(tmp_path, steps=30))
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] >= 6
    assert load(tmp_path)(noise(1, 64000)).y.isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_keep_memory_ends_the_page_faults_of_every_step():
    code = """import resource, torch, mt2
def faults():  # of a step that takes and frees ten tensors of 16 MB
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(2 ** 22) for _ in range(10)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin
usual = [faults() for _ in range(3)]
mt2.keep_memory()
print(min(usual), [faults() for _ in range(6)][-1])"""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc would adapt it, by what happened before
    done = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True, env=env)
    usual, kept = map(int, done.split())
    assert usual > 1000 and kept < 10


@pytest.mark.parametrize("cores, quota, ranks, device, given, workers, threads", [
    (8, "max", 1, "cpu", -1, 4, 4), (8, "max", 2, "cpu", -1, 2, 2), (1, "max", 1, "cpu", -1, 1, 1),
    (8, "max", 1, "cpu", 0, 0, 8), (8, "max", 1, "cuda", -1, 7, 1), (64, "max", 1, "cuda", -1, 12, 52),
    (8, "max", 1, "cuda", 3, 3, 5), (64, "350000", 1, "cpu", -1, 2, 2), (2, "350000", 1, "cpu", -1, 1, 1)])
def test_workers_and_threads_share_the_cores_that_a_container_grants(
        cores, quota, ranks, device, given, workers, threads, monkeypatch):
    seen = {"threads": None}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: f"{quota} 100000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.update(threads=n))
    monkeypatch.setattr(mt2, "keep_memory", lambda: None)
    loader = lambda *_, num_workers, **how: seen.update(workers=num_workers) or []
    monkeypatch.setattr(mt2, "DataLoader", loader)
    mt2.music_stream(tiny(workers=given), 0, torch.device(device), 0, 1)
    assert seen == dict(workers=workers, threads=threads)


def test_bf16_and_float32_agree_within_three_percent_over_a_short_run(tmp_path, monkeypatch):
    logs = []
    for enabled in (False, True):
        monkeypatch.setattr(mt2, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16, enabled=enabled))
        logs.append(log_of(train(tiny(tmp_path / str(enabled), batch=12, fresh=6)))[:, 1:4])
    assert abs(logs[0] - logs[1]).max() > 0
    np.testing.assert_allclose(*logs, rtol=0.03)


def test_bf16_is_used_where_a_cpu_multiplies_it(monkeypatch):
    for able in ({}, {"avx512_bf16": False}, {"avx512_bf16": True}, {"amx_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
        with mt2.autocast(torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") == any(able.values())


def test_a_compiled_run_is_the_plain_run_and_goes_on_as_it(tmp_path, monkeypatch):
    calls, whole = [], torch.compile

    def traced(function, **how):  # no C++ compiler needed; a break in the graph would be an error
        fast = whole(function, backend="aot_eager", fullgraph=True, **how)
        return lambda *given, **more: calls.append(1) or fast(*given, **more)
    monkeypatch.setattr(torch, "compile", traced)
    plain = train(tiny(tmp_path / "plain", steps=3, save_every=1))
    assert not calls
    config = tiny(tmp_path / "compiled", steps=3, save_every=1, compile=1)
    interrupted(config, 3)
    assert_close(weights(train(config)), weights(plain), rtol=1e-3, atol=1e-4)
    assert len(calls) == 3 * 2  # a pass for each task


def test_cpsd_compiles_whole_without_matrix_products_and_stays_what_it_was():
    y_a, y_b = (noise(8, 12, seed=s).softmax(1).requires_grad_() for s in (0, 1))
    k, results, compiled = torch.arange(8), [], []
    backend = lambda graph, inputs: compiled.append(graph.print_readable(print_output=False)) or graph
    for function in (cpsd, torch.compile(cpsd, backend=backend, fullgraph=True)):
        value = function(y_a, y_b, k)
        results.append([value, *torch.autograd.grad(value, (y_a, y_b))])
    assert_close(*results)
    assert "sum" in compiled[0] and not re.search("matmul|@", compiled[0])  # a product is not fused


def test_nt_xent_inside_a_compiled_function_stays_what_it_was_at_any_batch_size():
    step = lambda a, b: nt_xent(2 * a, b.tanh()) + a.square().mean()
    compiled = torch.compile(step, backend="aot_eager")
    for B in (4, 4, 6, 300):
        a, b = (noise(B, 8, seed=s).requires_grad_() for s in (0, 1))
        results = [[value := f(a, b), *torch.autograd.grad(value, (a, b))] for f in (step, compiled)]
        assert_close(*results)


@pytest.mark.parametrize("more", [dict(batch=5, pool=5, fresh=3), {}])
def test_every_step_sees_a_whole_batch_of_different_tracks_whatever_the_pool(more, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        at_step(patch, lambda n, batch: seen.append(batch[1].flatten(1)))
        train(tiny(tmp_path, steps=3, tasks="con", **more))
    for tracks in seen:  # in an empty place of the pool all is 0
        assert len(tracks.unique(dim=0)) == len(tracks) == tiny(**more).batch and tracks.any(1).all()


def test_a_hundred_steps_of_a_tiny_model_learn_key_and_no_shortcut(tmp_path):
    net = dict(tasks="eq", dim=48, heads=3)
    run = train(tiny(tmp_path, **net, frames=8, batch=128, pool=512, steps=100, save_every=100, warmup=10,
                     lr=8e-3, easy=0.5))
    falling = log_of(run)[:, 3]
    assert 2.9 < falling[:5].mean() < 3.1 and falling[-10:].mean() < 2.7  # eight seeds: 2.55 to 2.62
    waves, labels = SyntheticMusic(22).batch(96, 0)
    before, after = (monitor(net, waves, labels["key_signature"]) for net in (model(**net), load(run)))
    assert before["follows_key"] < 0.3 and after["follows_key"] > 0.6 and after["follows_offset"] < 0.25
    assert after["fork"] > 0.85 and after["equivariance"] > 0.7


def centred_cpsd(net, logits, offset):
    y_a, y_b = net.center(logits, offset, training=True).softmax(1).chunk(2)
    return cpsd(y_a, y_b, offset[:len(y_a)] - offset[len(y_a):])


TWO_RANKS = FEW + """
import json, sys, torch, torch.distributed as dist
import test_mt2
seen, real = [], mt2.losses
mt2.losses = lambda net, *rest: seen.append(net) or real(net, *rest)
mt2.train(mt2.Config(**json.loads(sys.argv[1])))
given = torch.load(sys.argv[2], weights_only=True)
rank, net = dist.get_rank(), test_mt2.model().train()
a, b, logits, offset = (given[k].chunk(2)[rank].clone() for k in ("a", "b", "logits", "offset"))
inputs = [x.requires_grad_() for x in (a, b, logits)]
losses = torch.stack([mt2.nt_xent(a, b), test_mt2.centred_cpsd(net, logits, offset)])
result = {"losses": losses.detach(), "grads": torch.autograd.grad(losses.sum(), inputs)}
torch.save(result | {"model": seen[0].state_dict()}, f"{sys.argv[2]}.{rank}")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Two gloo processes train three steps and take both losses of their half of `given`."""
    root = tmp_path_factory.mktemp("ranks")
    given = dict(a=noise(10, 6), b=noise(10, 6, seed=1), logits=noise(40, 12), offset=torch.arange(40) % 3)
    torch.save(given, root / "given")
    (root / "script.py").write_text(TWO_RANKS)
    launch = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, root / "script.py",
                    json.dumps(TINY | {"out": str(root / "run"), "steps": 3}), root / "given")
    said, errors = launch.communicate(timeout=100)
    assert launch.returncode == 0, errors
    ranks = [torch.load(f"{root}/given.{rank}", weights_only=True) for rank in (0, 1)]
    return root / "run", given, ranks, said, errors


def test_two_ranks_write_one_run_and_end_with_equal_weights(two_ranks):
    run, _, ranks, said, errors = two_ranks
    assert len(log_of(run)) == 3 and set(files_of(run)) == {"model.pt", "state.pt", "log.csv", "monitor.csv"}
    for rank in ranks:
        assert_close(rank["model"], weights(run), rtol=0, atol=0)
    assert said.count("parameters") == 1 and not re.search("Traceback|Warning|Error", errors)


def test_losses_of_two_ranks_equal_one_process_in_value_and_gradient(two_ranks):
    _, given, ranks, _, _ = two_ranks
    inputs = [given[k].requires_grad_() for k in ("a", "b", "logits")]
    # one process sees the halves as two ranks did: each half is its own A and B
    order = torch.arange(40).view(2, 2, 10).transpose(0, 1).flatten()
    whole = nt_xent(*inputs[:2]), centred_cpsd(model().train(), inputs[2][order], given["offset"][order])
    for i, expected in enumerate(torch.autograd.grad(sum(whole), inputs)):
        mine = torch.cat([rank["grads"][i] for rank in ranks]) / 2  # the loop takes the mean over ranks
        assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    assert_close(sum(rank["losses"] for rank in ranks) / 2, torch.stack(whole).detach())


def test_gradients_are_averaged_not_summed(monkeypatch):
    monkeypatch.setattr(mt2, "world_size", lambda: 4)
    monkeypatch.setattr(mt2.dist, "all_reduce", lambda x: x.mul_(4))  # four processes that agree
    given = [noise(2, 3), noise(4), torch.tensor(1.0)]
    mt2.average(mine := [x.clone() for x in given])
    assert_close(mine, given)


def torchrun(*words, **more):
    """Two ranks on this machine -> exit status, what they said, errors."""
    launch = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *words, **more)
    said, errors = launch.communicate(timeout=100)
    return launch.returncode, said, errors


def test_a_run_of_one_process_goes_on_with_two(tmp_path):
    interrupted(tiny(tmp_path / "run", tasks="con"), 5)  # con: no monitor, so quick
    code, said, errors = torchrun(HERE / "mt2.py", *FLAGS, "--tasks=con", cwd=tmp_path)
    assert code == 0 and "steps 3 to 8" in said and "Traceback" not in errors, errors
    assert [int(row[0]) for row in log_of(tmp_path / "run")] == list(range(1, 9))


def test_a_dying_rank_ends_the_job_with_a_message(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, time, mt2\nreal = mt2.losses\n"
        "def losses(*given):\n    if os.environ['RANK'] == '1':\n        raise ValueError('rank 1 fell')\n"
        "    return real(*given)\nmt2.losses = losses\n"
        "mt2.dist.destroy_process_group = lambda: time.sleep(900)  # NCCL's would wait for rank 0\n"
        "mt2.main()\n")
    code, _, errors = torchrun(tmp_path / "script.py", *FLAGS, "--tasks=con", cwd=tmp_path)
    assert code != 0 and "mt2: rank 1 fell" in errors


# ---- The command line ------------------------------------------------------------------------------------

BAD = ["--steps 0", "--steps many", "--batch 1", "--size huge", "--tasks key", "--tasks con,eq",
       "--tasks=", "--inputs cqt", "--inputs mel --tasks eq", "--inputs wave --tasks con",
       "--encoder cnn", "--tasks banana,con --encoder tune", "--tasks content --encoder tune",
       "--inputs cqt --encoder tune", "--generated 1", "--generated -0.1",
       "--expansion 5", "--device tpu", "--dim 100 --heads 3", "--heads 0", "--dim 0",
       "--depth 0", "--depth 1000000",
       "--frames 127", "--fresh 0", "--fresh 4000", "--pool 3", "--temperature 0",
       "--temperature nan", "--lr -1", "--lr nan", "--lr inf", "--eq-weight nan", "--eq-weight -1",
       "--eq-db -1", "--easy 0.9", "--easy -1", "--gap -1", "--gap inf", "--seed -1",
       "--seed 99999999999999999999", "--workers -2", "--warmup 0", "--save-every 0", "--proj-dim 0",
       "--hide-mel 2", "--data missing", "--data empty", "--out file", "--out file/run", "--out nowhere",
       "--init missing", "--colour red"]


def run_main(patch, capsys, *flags):
    """mt2.main in this process -> its exit status, and what it leaves on stderr beside the progress bar."""
    patch.setattr(sys, "argv", ["mt2.py", *map(str, flags)])
    try:
        code = mt2.main() or 0
    except SystemExit as end:
        code = end.code or 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines += code.splitlines() if isinstance(code, str) else []
    return code, [line for line in lines if line.strip("\x1b[A ") and "step/s" not in line]


@pytest.mark.parametrize("flags", BAD)
def test_a_bad_flag_gets_one_line_that_names_it(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("precious")
    Path("nowhere").symlink_to("unmounted")
    code, lines = run_main(monkeypatch, capsys, *FLAGS, *flags.split())
    flag, value = re.split("[ =]", flags)[:2]
    assert code != 0 and len(lines) == 1, lines
    assert flag in lines[0] or flag in ("--data", "--init") and value in lines[0]
    assert Path("file").read_text() == "precious"
    assert {p.name for p in Path().iterdir()} == {"empty", "file", "nowhere"}


def shared_memory_full():
    raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")


class Killed(mt2.Dataset):
    """Ends its worker as the system does where memory is short."""

    def __len__(self):
        return 1

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("cause, remedy", [
    (lambda: torch.empty(2 ** 60), "lower --batch, --pool or --dim"),
    (disk_full, "make room; the same command goes on"),
    (shared_memory_full, "try --workers 0"),
    (lambda: next(iter(mt2.DataLoader(Killed(), num_workers=1))), "try --workers 0")])
def test_what_a_machine_lacks_is_said_with_its_remedy(cause, remedy, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(mt2, "train", lambda config: cause())
    code, lines = run_main(monkeypatch, capsys)
    assert len(lines) == 1 and lines[0].endswith(f"; {remedy}"), lines
    monkeypatch.undo()
    flags = FLAGS + ["--out", tmp_path / "run", "--data", tmp_path / "allocated"]  # no such folder
    code, lines = run_main(monkeypatch, capsys, *flags)
    assert code and "lower --batch" not in lines[0]


@pytest.mark.parametrize("tasks, easy", [("eq,con", 0), ("con", 0.4)])  # 0.4: generated music comes first
def test_a_folder_with_nothing_usable_ends_in_one_line_before_the_first_step(
        tasks, easy, monkeypatch, capsys, tmp_path):
    (tmp_path / "words.wav").write_text("words")
    flags = FLAGS + ["--out", tmp_path / "run", "--data", tmp_path, "--tasks", tasks, "--easy", easy]
    code, lines = run_main(monkeypatch, capsys, *flags)
    assert code != 0 and len(lines) == 1 and f"{tmp_path}: none of 1 files can be used" in lines[0], lines
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_is_emptied_meanwhile_ends_in_one_line(workers, songs, monkeypatch, capsys, tmp_path):
    folder = shutil.copytree(songs, tmp_path / "songs")
    at_step(monkeypatch, lambda n, batch: shutil.rmtree(folder, ignore_errors=True))
    flags = ["--out", tmp_path / "run", "--data", folder, "--tasks", "con", "--easy", 0, "--steps", 30]
    code, lines = run_main(monkeypatch, capsys, *FLAGS, *flags, "--workers", workers)
    assert code != 0 and "none of 8 files can be used" in lines[-1] and "gone" in lines[-1], lines
    # the iterator of a worker that failed is freed by the collector, which waits so long for each worker
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    gc.collect()


def test_help_names_every_field(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mt2.py", "--help"])
    with pytest.raises(SystemExit) as end:
        mt2.main()
    said, fields = capsys.readouterr().out, dataclasses.fields(Config)
    assert end.value.code == 0 and all(f"--{f.name.replace('_', '-')} " in said for f in fields)


def test_the_command_trains_on_odd_names_says_what_it_does_and_refuses_in_one_line(songs, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")  # a name that is no text
    Path(odd).write_text("words")
    (tmp_path / "good.wav").write_bytes((songs / "0.wav").read_bytes())
    first = python(HERE / "mt2.py", *FLAGS, "--data", ".", "--easy", 0, "--tasks", "con", cwd=tmp_path)
    second = python(HERE / "mt2.py", "--batch", "1", cwd=tmp_path)
    said, errors = first.communicate(timeout=100)
    assert first.returncode == 0 and "Traceback" not in errors, errors
    assert all(part in said for part in ("parameters", "nt_xent 1.95", "caf", "step 8: skipped 1 files"))
    assert said.endswith("run/model.pt is trained; what it knows: python probe.py run\n")
    assert len(log_of(tmp_path / "run")) == 8
    said, errors = second.communicate(timeout=100)
    assert second.returncode == 1 and said == "" and re.fullmatch("mt2: --batch 1: .*\n", errors)


# ---------------------------------------------------------------------------------------------------------
# probe.py
# ---------------------------------------------------------------------------------------------------------

def probe_main(capsys, *words):
    """-> what `python probe.py WORDS` prints, or, where it refuses, its one line."""
    try:
        probe.main([*map(str, words)])
    except SystemExit as end:
        assert isinstance(end.code, str) and "\n" not in end.code and end.code.startswith("probe: "), end.code
        capsys.readouterr()
        return end.code
    return capsys.readouterr().out


@pytest.fixture
def short_probe(monkeypatch):
    """Probes on generated music with 20 clips a part, 500 frames and two seeds."""
    few = (20, 20, 20)
    for name, value in dict(COUNTS=few, LOCAL=few, CHUNK=20, MAX_ROWS=500, SEEDS=(0, 1)).items():
        monkeypatch.setattr(probe, name, value)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A tiny model that was hardly trained, and three songs of eight seconds."""
    root = tmp_path_factory.mktemp("probe")
    train(tiny(root / "run", steps=1))
    waves, labels = SyntheticMusic(5).batch(6, 0)
    for i, pair in enumerate(waves):
        soundfile.write(root / f"song{i}.wav", pair.flatten().numpy(), 16000)
    return root


def test_probes_at_once_equal_probes_one_by_one_and_the_optimum():
    x, y = noise(3, 90, 5).double(), F.one_hot(torch.arange(90) % 4, 4).double()
    together = probe.fit(x, y, False, l2=(0.01, 0.1), steps=400)
    for g in range(3):
        for k, l2 in enumerate((0.01, 0.1)):
            alone = probe.fit(x[g:g + 1], y, False, l2=(l2,), steps=400)[0, 0]
            assert_close(together[g, k], alone)
            w = together[g, k].clone().requires_grad_()
            loss = -(y * (x[g] @ w[:-1] + w[-1]).log_softmax(-1)).sum(-1).mean()
            loss = loss + l2 / 2 * w[:-1].square().sum()
            assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-5  # nothing is left to gain


def test_a_probe_finds_what_was_planted_and_nothing_in_noise():
    y = torch.arange(600) % 3
    x = noise(2, 600, 8)
    x[1, :, 2] += 4 * y  # the second of two feature sets tells the class
    target = F.one_hot(y, 3).float()
    predict, loss, _ = probe.probe(x[:, :300], target[:300], x[:, 300:450], target[300:450], False)
    right = (predict(x[:, 450:]).argmax(-1) == y[450:]).float().mean(1)
    assert right[0] < 0.5 and right[1] > 0.8 and loss[1] < loss[0]


def test_features_are_standardised_by_the_training_rows(monkeypatch):
    seen, fit, y = [], probe.fit, F.one_hot(torch.arange(60) % 2).float()
    monkeypatch.setattr(probe, "fit", lambda x, *more: seen.append(x) or fit(x, *more))
    probe.probe(3 * noise(1, 60, 4) + 5, y, 9 * noise(1, 60, 4), y, False)
    for got, value in ((seen[0].mean(1), 0.0), (seen[0].std(1), 1.0)):
        assert_close(got, torch.full((1, 4), value), rtol=0, atol=1e-5)


def test_scale_and_offset_of_features_change_nothing_and_constant_ones_are_not_used():
    x, y = noise(1, 60, 4), F.one_hot(torch.arange(60) % 2).float()
    said = [probe.probe(given, y, given, y, False)[0](given)
            for given in (x, 1e-9 * x, 1e4 * (x + 1), torch.cat([x, 99 + 1e-5 * noise(1, 60, 2, seed=1)], 2),
                          torch.cat([x, 1e-8 * noise(1, 60, 2, seed=1)], 2))]
    for other in said[1:]:
        assert_close(other, said[0], rtol=1e-2, atol=1e-3)


def test_frames_are_kept_in_half_precision_unless_that_spoils_them():
    x = noise(1, 2, 126, 3)
    for scale, offset, kind in ((1, 0, torch.float16), (1e-9, 0, torch.float32), (1, 5e3, torch.float32),
                                (1e6, 0, torch.float32)):
        system = {("x", ()): lambda waves: {"seq": scale * x + offset}}
        found = probe.collect(system, [(torch.zeros(2, 1), torch.arange(2), torch.zeros(2), True)], "cpu")[0]
        assert found["x", ()]["seq"].dtype == kind
        assert_close((found["x", ()]["seq"].float() - offset) / scale, x, rtol=0, atol=2e-3)


def test_a_mixture_leans_on_the_layer_that_tells():
    y = torch.arange(600) % 3
    x, target = noise(3, 600, 8), F.one_hot(y, 3).float()
    x[1, :, 2] += 4 * y
    held = x[:, 300:450], target[300:450]
    predict, loss, share = probe.probe(x[:, :300], target[:300], *held, False, mix=True)
    assert predict(x[:, 450:])[0].argmax(1).eq(y[450:]).float().mean() > 0.8 and share[1] > 0.6
    assert share.sum().item() == pytest.approx(1, abs=1e-5) and loss.shape == (1,)


@pytest.mark.parametrize("valid", [[], [6, 7]])
def test_a_probe_neither_trains_nor_chooses_on_test_files_nor_trains_on_what_it_chooses_by(
        valid, monkeypatch):
    seen, probe_of = [], probe.probe
    files = lambda x: frozenset(x[0, :, 0].tolist())  # each file's one feature is its number

    def spy(x, y, held, *more):
        seen.append((files(x), files(held)))
        return probe_of(x, y, held, *more)
    monkeypatch.setattr(probe, "probe", spy)
    task = probe.clip_task("mood", [*"ababababab"], torch.arange(10))
    parts = [torch.tensor(part, dtype=torch.long) for part in ([0, 1, 2, 3, 4, 5], valid, [8, 9])]
    found = {("x", (0, 1, 2)): {"eq": torch.arange(10.).view(1, 10, 1)}}
    probe.study(found, {"mood": task}, {"mood": parts}, "cpu", False)
    assert len(seen) == 3 and len(set(seen)) > 1  # a probe for each seed, which leaves out others
    for train, held in seen:
        assert held and len(train) >= 4 and not train & held and not {8, 9} & (train | held)
        assert not valid or held == {6, 7}


def test_the_probe_of_a_mixture_has_a_decay_of_one_hundredth():
    x, y = torch.tensor([[[1.0], [-1.0]]]), torch.eye(2)  # no noise: without decay weights never end
    (a, b), = probe.fit_mixture(x, y, False)[1].tolist()
    assert a == pytest.approx(-b, rel=1e-3)
    assert 0.01 * a == pytest.approx(1 / (1 + math.exp(2 * a)), rel=0.01)
    for n in (1, 5):  # the same tag n times: each as if it were alone
        w = probe.fit_mixture(x, y[:, :1].expand(2, n), True)[1].flatten()
        assert_close(0.01 * w, 1 / (1 + w.exp()), rtol=0.01, atol=0)


def test_readouts_are_what_their_names_say():
    x = noise(2, 3, 128, 5)  # two layers of eq, con and 126 frames
    cls, seq = x[:, :, :2], x[:, :, 2:]
    assert_close(probe.readouts(x, ("eq", "con")), dict(
        eq=x[:, :, 0], con=x[:, :, 1], cls_avg=cls.mean(2), seq_avg=seq.mean(2), all_avg=x.mean(2), seq=seq))
    assert probe.readouts(x, ("eq",)).keys() == {"eq", "seq_avg", "all_avg", "seq"}
    assert probe.readouts(x).keys() == {"seq_avg", "seq"}


def test_tunes_stages_are_read_at_the_frames_that_it_heard_and_end_in_zeros():
    net = TUNe(tiny(encoder="tune")).eval()
    with torch.no_grad():
        seq = probe.of_model(net, None)(noise(1, 64000))["seq"]  # the first layer is 11 wide
    assert seq.shape[2] == 126 and seq[0, ..., :11].any() and not seq[0, ..., 11:].any()
    for edge in (seq[0, 0, :6], seq[0, 0, -6:]):  # five frames at either end are not heard
        assert len(edge.unique(dim=0)) == 1


def test_probabilities_of_windows_are_averaged_per_file(monkeypatch):
    monkeypatch.setattr(probe, "probe", lambda *given: (lambda x: x, torch.zeros(1), None))
    p, file = torch.tensor([[[.6, .4], [.6, .4], [.1, .9], [.3, .7]]]), torch.arange(2)
    for labels, right in ("ab", 0), ("ba", 1):  # of the first file's windows only the last says b
        task = probe.clip_task("mood", labels, torch.tensor([0, 0, 0, 1]))
        (score,), _, _ = probe.evaluate(p.log(), task, (file, file, file[:1]), "cpu", False)
        assert score == {"accuracy": right}
    tags = probe.clip_task("tags", [{"a"}, {"b"}, {"a"}], torch.tensor([0, 0, 1, 1, 1, 2]))  # one each
    p = torch.tensor([.9, .9, .4, .4, .4, .8])  # sums would rank the second file above the third
    assert tags.multi and tags.score(torch.stack([p, 1 - p], 1), torch.arange(3), None)["roc_auc"] == 1


def test_scores_are_filed_under_their_readout_and_layer(monkeypatch):
    monkeypatch.setattr(probe, "evaluate", lambda x, *_: (
        [{"accuracy": v.mean()} for v in x], [0.0] * len(x), None))
    eq, con = torch.arange(1., 5).view(2, 2, 1, 1)  # two layers each
    task, parts = probe.Task("x", torch.eye(2), torch.arange(2), None), [torch.arange(9)] * 3
    rows = probe.study({("x", (0,)): dict(eq=eq, con=con)}, {"mood": task}, {"mood": parts}, "cpu", False)
    assert [(r["readout"], r["layer"], r["value"]) for r in rows] == [
        ("eq", 0, 1), ("eq", 1, 2), ("con", 0, 3), ("con", 1, 4)]


def test_references_see_pitch_class_rise_and_neighbours():
    front, wave = mt2.FrontEnd(), tone([261.63])
    chroma = probe.of_spectrum("chroma", front)(wave)
    assert chroma["mean+std"].shape == (1, 1, 24) and chroma["mean+std"][0, 0].argmax() == 3  # A is 0
    assert chroma["seq"].shape == (1, 1, 126, 36)
    click = F.pad(torch.ones(1, 1), (32000, 31999))  # first heard in frame 62
    assert probe.of_spectrum("flux", front)(click)["curve"].argmax() == 62


def test_log_mel_is_scaled_and_a_frame_knows_those_two_away():
    mel = 30 * noise(2, 126, 128) - 60  # dB
    seq = probe.of_spectrum("log-mel", lambda wave: (mel, noise(2, 126, 99)))(None)["seq"]
    assert_close(seq[0, :, 10].unflatten(1, (128, 3)).mT, unit_range(mel)[:, [8, 10, 12]])


def test_attention_is_that_of_the_pass_that_a_token_comes_from():
    net, wave = model(), noise(2, 64000)
    before = probe.attention(net, wave)
    assert before["eq"].shape == before["seq"].shape == (1, 2, 2, 126)  # [blocks, B, heads, frames]
    other_mel = lambda module, given, out: (out[0] + 20 * noise(2, 126, 128, seed=5), out[1])
    net.front_end.register_forward_hook(other_mel)
    after = probe.attention(net, wave)
    assert torch.equal(before["eq"], after["eq"])
    assert all((before[name] - after[name]).abs().max() > 1e-5 for name in ("con", "seq"))


def test_emergent_onsets_are_rises_of_each_heads_attention(monkeypatch):
    maps = torch.zeros(2, 3, 4, 126)  # [blocks, B, heads, frames]
    maps[1, 2, 3, 7:9] = 1
    monkeypatch.setattr(probe, "attention", lambda *_: {"eq": maps})
    rise = probe.of_attention(None)(None)["eq"]
    assert rise.shape == (8, 3, 126, 1) and rise.nonzero().tolist() == [[7, 2, 7, 0]]


def test_average_precision_and_auc_equal_scikit_learn_with_ties_and_skip_absent_tags():
    truth = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]])
    said = np.array([[.9, .2, .5, .1], [.9, .8, .5, .2], [.3, .8, .1, .3],
                     [.3, .1, .5, .4], [.7, .2, .5, .5], [.1, .2, .9, .6]])
    precision, auc = [0.588888889, 0.866666667, 0.85], [0.666666667, 0.888888889, 0.8125]  # by scikit-learn
    for c in range(3):
        expected = pytest.approx({"map": precision[c], "roc_auc": auc[c]})
        assert probe.ranking(truth[:, [c]], said[:, [c]]) == expected
    together = {"map": np.mean(precision), "roc_auc": np.mean(auc)}  # the last column has no positive
    assert probe.ranking(truth, said) == pytest.approx(together)


def test_tempo_counts_octave_errors_only_in_acc2_and_nothing_beyond_4_percent():
    said = np.array([103., 105, 200, 50, 300, 33, 70])
    assert probe.tempo_accuracy(np.full(7, 100.), said) == pytest.approx({"acc1": 1 / 7, "acc2": 5 / 7})


@pytest.mark.parametrize("fastest", [100.5, 104.9, 105.1, 131, 200])
def test_every_tempo_has_a_class_within_4_percent(fastest):
    truth = [{bpm} for bpm in np.linspace(100, fastest, 60)]
    task = probe.clip_task("tempo", truth, torch.arange(60))
    assert task.y.sum(1).eq(1).all()
    assert task.score(task.y, torch.arange(60), None) == {"acc1": 1, "acc2": 1}


def test_a_key_a_fifth_above_the_truth_scores_one_half():
    task = probe.clip_task("key", [{0}], torch.tensor([0]))  # C major, and G major said
    assert task.score(torch.eye(24)[[7]], torch.tensor([0]), None) == {"accuracy": 0, "mirex": 0.5}


def test_chord_labels_fold_to_major_minor_and_none():
    labels = "C:maj", "A:min7", "Db", "N", "B:dim", "C:9", "A:min9"
    assert [probe.chord_class(c) for c in labels] == [0, 21, 1, 24, -1, 0, 21]
    with pytest.raises(importlib.import_module("mir_eval").chord.InvalidChordException, match="H:dur"):
        probe.chord_class("H:dur")


def test_frames_get_the_chord_that_sounds_and_no_other():
    now = torch.arange(126) * 0.032 + torch.tensor([[0.0], [4.0]])
    truth = [(np.array([[1.0, 2.0], [2.0, 4.0], [4.0, 8.0]]), [3, -1, 24])]  # a frame lies at 4 s, one at 8 s
    index = probe.chord_task("chord", truth, torch.zeros(2, dtype=torch.long), now).y
    label = torch.where(index.isnan().any(2), -1, index.argmax(2))
    expected = [[3 if 1 <= t < 2 else 24 if 4 <= t < 8 else -1 for t in row] for row in now.tolist()]
    assert label.tolist() == expected


def test_events_beyond_what_was_read_are_not_missed():
    owner, now = torch.zeros(2, dtype=torch.long), torch.arange(126) * 0.032 + torch.tensor([[0.0], [4.0]])
    task = probe.event_task("beat", [np.arange(0.5, 240, 0.5)], owner, now)  # 240 s, 8 of them read
    assert task.score(task.y, owner[:1], owner[:1])["f_measure"] == 1


def test_the_target_of_an_event_is_the_nearest_frame():
    now = torch.arange(126) * 0.032 + torch.tensor([[0.0], [4.0], [0.0]])
    task = probe.event_task("onset", [np.array([1.0, 4.1]), None], torch.tensor([0, 0, 1]), now)
    assert task.y[:2, :, 0].nonzero().tolist() == [[0, 31], [1, 3]] and task.y[2].isnan().all()


@pytest.mark.parametrize("name, expected", [("beat", 1), ("beats", 1), ("onset", 0), ("onsets", 0)])
def test_beats_count_within_70_ms_and_onsets_within_50(name, expected):
    now, file = torch.arange(126)[None] * 0.032, torch.tensor([0])
    task = probe.event_task(name, [np.array([1.0])], file, now)
    p = torch.eye(126)[33].view(1, 126, 1)  # 1.056 s
    assert task.score(p, file, file)["f_measure"] == expected


def test_a_peak_is_the_highest_within_two_frames():
    curve = torch.tensor([[0, 0.5, 0.3, 0.6, 0, 0, 0.1, 0]])
    assert probe.peaks(curve).nonzero()[:, 1].tolist() == [3, 6]


def test_the_threshold_of_events_comes_from_validation_files():
    now, one = torch.arange(126) * 0.032 + torch.zeros(2, 1), torch.tensor([1])
    task = probe.event_task("onset", [np.array([1.0]), np.array([1.0, 2.0])], torch.arange(2), now)
    p = torch.zeros(2, 126, 1)
    p[0, [31, 60], 0], p[1, [31, 62], 0] = torch.tensor([0.9, 0.8]), torch.tensor([0.95, 0.3])
    assert task.score(p, one, one - 1)["f_measure"] == pytest.approx(2 / 3)  # one of two found


def test_without_an_event_in_validation_the_surest_peak_alone_is_an_event():
    now = torch.arange(126) * 0.032 + torch.zeros(2, 1)
    task = probe.event_task("onset", [np.array([]), np.array([1.0])], torch.arange(2), now)
    p = torch.zeros(2, 126, 1)
    p[:, [31, 60, 90], 0] = torch.tensor([0.9, 0.2, 0.3])  # 31: at 1 s
    assert task.score(p, torch.tensor([1]), torch.tensor([0]))["f_measure"] == 1
    with warnings.catch_warnings():  # none of mir_eval where nothing is found
        warnings.simplefilter("error")
        assert task.score(0 * p, torch.tensor([1]), torch.tensor([0]))["f_measure"] == 0


@pytest.mark.parametrize("seconds, windows", [(1, 1), (4.9, 1), (5.1, 2), (8, 2)])
def test_a_rest_shorter_than_a_quarter_of_a_window_is_dropped(seconds, windows, tmp_path, capsys):
    soundfile.write(tmp_path / "x.wav", tone([440], seconds)[0].numpy(), 16000)
    assert probe.cut(tmp_path / "x.wav").shape == (windows, 64000)
    assert ("x.wav: shorter than 4 s, padded" in capsys.readouterr().err) == (seconds < 4)


def test_of_a_long_file_only_the_start_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "LIMIT", 8.0)
    soundfile.write(tmp_path / "x.wav", tone([440], 13, 8000)[0].numpy(), 8000)
    assert probe.cut(tmp_path / "x.wav").shape == (2, 64000)


def test_an_ablation_refuses_its_flags_before_it_trains(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for *flags, said in (("--task", "smell", "smell"), ("--seeds", "0", "--seeds"), ("--data", "x.csv", "x"),
                         ("--seed", "-1", "--seed -1: at least 0")):
        assert said in probe_main(capsys, "ablation", *flags)
    assert not list(tmp_path.iterdir())


def test_the_table_on_generated_music_has_every_task_and_its_references(small_run, short_probe, capsys):
    said = probe_main(capsys, small_run / "run", "--out", small_run / "out")
    rows = json.loads((small_run / "out" / "results.json").read_text())
    assert {"encoder", "task", "readout", "layer", "metric", "value", "n_train", "n_test"} <= rows[0].keys()
    tasks = {"key", "key_signature", "instrument", "tags", "tempo", "chord", "beat", "onset"}
    assert {r["task"] for r in rows} == tasks
    mine = {(r["readout"], r["layer"]) for r in rows if r["task"] == "key" and r["encoder"].endswith("run")}
    assert mine == {(readout, layer) for readout in probe.READOUTS for layer in (0, 1)}
    assert all(name in said for name in ("untrained", "log-mel", "chroma", "flux"))
    losses = {n: [r["valid_loss"] for r in rows if r["encoder"].endswith(n)] for n in ("run", "untrained")}
    assert len(losses["run"]) == len(losses["untrained"]) and losses["run"] != losses["untrained"]
    assert (small_run / "out" / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_generated_clips_have_their_labels_and_no_part_shares_one_with_another_or_with_training(monkeypatch):
    for name, value in dict(COUNTS=(2, 2, 2), LOCAL=(2, 2, 2), CHUNK=2).items():
        monkeypatch.setattr(probe, name, value)
    made, truth = [], probe.defaultdict(list)
    monkeypatch.setattr(mt2, "SyntheticMusic", lambda seed: made.append(seed) or SyntheticMusic(seed))
    heard = torch.cat([waves for waves, *_ in probe.generated(truth)])
    assert len(heard.abs().sum(1).unique()) == 6  # clips
    assert len({*made}) == 3 and max(made) < 4096 and not {998, 999} & {*made}
    for part, seed in enumerate(made):
        waves, labels = SyntheticMusic(seed).batch(2, 0)
        for i in range(2):
            n, (key, lead) = 2 * part + i, (labels[k][i].item() for k in ("key_signature", "instrument"))
            assert torch.equal(heard[n], waves[i, 0])
            frames, now = labels["chord"][i, 0], torch.arange(126) * 0.032
            y = probe.chord_task("chord", truth["chord"], torch.tensor([n]), now[None]).y[0]
            assert torch.equal(y, F.one_hot(frames, 25).float())
            assert truth["tags"][n] == {probe.PITCHES[key], [*mt2.INSTRUMENTS][lead]}
            for name in ("beat", "onset"):
                times = labels[f"{name}s"][i, 0]
                assert truth[name][n].tolist() == times[times.isfinite()].tolist()


def test_the_table_takes_the_layer_of_the_lowest_validation_loss_and_names_no_last_of_one(capsys):
    row = dict(task="key", readout="eq", metric="accuracy", std=0.0)
    layers = [(0.9, 2.0), (0.5, 1.0), (0.8, None), (0.4, 3.0)]  # test score, validation loss
    rows = [row | dict(encoder="a", layer=i, value=v, valid_loss=loss) for i, (v, loss) in enumerate(layers)]
    probe.table(rows + [row | dict(encoder="b", layer=0, value=0.4, valid_loss=None)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["a", "eq", "0.500±0.000", "L1"], ["a", "eq", "last", "0.400±0.000", "L3"],
        ["b", "eq", "0.400±0.000"]]


def test_a_manifest_with_split_is_probed_and_a_short_file_is_padded(small_run, capsys):
    soundfile.write(small_run / "short.wav", 0.5 * tone([440], 1)[0].numpy(), 16000)
    songs = [f"song{i}.wav" for i in range(6)] + ["short.wav"]
    lines = [f"{song},{('A minor,slow', 'C major,loud|fast')[i % 2]},{'test' if i > 3 else 'train'}"
             for i, song in enumerate(songs)]
    (small_run / "good.csv").write_text("path,key,tags,split\n" + "\n".join(lines))
    flags = "--data", small_run / "good.csv", "--out", small_run / "manifest"
    said = probe_main(capsys, small_run / "run", "--task", "key,tags", *flags)
    rows = json.loads((small_run / "manifest" / "results.json").read_text())
    assert {r["metric"] for r in rows} == {"accuracy", "mirex", "map", "roc_auc"} and "key" in said
    assert {(r["n_train"], r["n_test"]) for r in rows} == {(4, 3)}


def test_without_a_split_a_fifth_is_for_testing_by_seed_and_tags_lie_between_bars(
        tmp_path, capsys, monkeypatch):
    for i in range(27):
        (tmp_path / f"{i}.wav").write_bytes(b"")
    cells = ["a| b |"] + 13 * ["a"] + 12 * ["b"] + [""]  # the last without a label
    (tmp_path / "x.csv").write_text("path,mood\n" + "\n".join(f"{i}.wav,{c}" for i, c in enumerate(cells)))
    read = lambda seed: probe.manifest(tmp_path / "x.csv", ["mood"], seed, False)
    split = lambda seed: [x.tolist() for x in read(seed)[2]["mood"]]
    assert [len(part) for part in split(0)] == [20, 0, 6] and sorted(sum(split(0), [])) == list(range(26))
    assert split(1) == split(1) and len({str(split(seed)) for seed in range(9)}) > 3
    assert read(0)[1]["mood"][:2] == [{"a", "b"}, {"a"}]

    def manifest(path, tasks, seed):
        raise ValueError(f"{path} {tasks} {seed}")
    monkeypatch.setattr(probe, "manifest", manifest)
    monkeypatch.setattr(probe, "of_package", lambda *_: None)
    flags = "--encoder", "x:y", "--data", "z.csv", "--task", "a,b", "--seed", 7
    assert probe_main(capsys, *flags) == "probe: z.csv ['a', 'b'] 7"


@pytest.mark.parametrize("name, text, task, expected", [
    ("column", "path,key\nsong0.wav,C major", "mood", "must have one column 'mood'"),
    ("missing", "path,key\nnowhere.wav,C major\nsong1.wav,A minor", "key", "missing"),
    ("one class", "path,mood,split\nsong0.wav,sad,train\nsong1.wav,sad,train\nsong2.wav,sad,test", "mood",
     "one class"),
    ("unseen", "path,mood,split\nsong0.wav,a,train\nsong1.wav,b,train\nsong2.wav,c,test", "mood",
     "not in train"),
    ("no key", "path,key\nsong0.wav,H dur\nsong1.wav,C major", "key", "no key"),
    ("empty lab", "path,chords\nsong0.wav,empty.lab\nsong1.wav,empty.lab", "chords", "empty.lab"),
    ("twice", "path,key\nsong0.wav,C major\nsong0.wav,A minor", "key", "listed twice"),
    ("no row", "path,key", "key", "0 labels in train"),
    ("one tempo", "path,bpm,split\nsong0.wav,90,train\nsong1.wav,90,train\nsong2.wav,70,test", "bpm",
     "one class"),
    ("two columns", "path,key,key\nsong0.wav,C major,A minor", "key", "must have one column 'key'"),
    ("twice in other words", "path,key\nsong0.wav,C major\nrun/../song0.wav,A minor", "key", "listed twice"),
    ("more cells", "path,key\nsong0.wav,C major, sad\nsong1.wav,A minor", "key", "more cells than"),
    ("spaced chord", "path,chords\nsong0.wav,spaced.lab\nsong1.wav,spaced.lab", "chords", "a chord like A"),
    ("no chord", "path,chords\nsong0.wav,bad.lab\nsong1.wav,bad.lab", "chords", "chord label: Q:maj"),
    ("two keys", "path,key\nsong0.wav,C major / A minor\nsong1.wav,A minor", "key", "is no key"),
    ("open quote", 'path,key\nsong0.wav,"C major\nsong1.wav,A minor', "key", "unexpected end"),
    ("odd digit", "path,tempo\nsong0.wav,1²\nsong1.wav,90", "tempo", "could not convert"),
    ("late lab", "path,chords\nsong0.wav,late.lab\nsong1.wav,late.lab", "chords", "but the sound ends")])
def test_a_bad_manifest_is_refused_and_nothing_is_written(small_run, capsys, name, text, task, expected):
    (small_run / "empty.lab").write_text("")
    (small_run / "spaced.lab").write_text("0.0 2.0 A min")
    (small_run / "late.lab").write_text("0.0\t99.0\tC:maj\n")
    (small_run / "bad.lab").write_text("\ufeff0.0\t1.0\tQ:maj\n", encoding="utf-8")  # after a byte order mark
    (small_run / "bad.csv").write_text(text)
    out = small_run / "never"
    flags = "--data", small_run / "bad.csv", "--task", task, "--out", out
    said = probe_main(capsys, small_run / "run", *flags)
    assert said.startswith("probe: ") and expected in said and not out.exists()


@pytest.mark.parametrize("command", ["", "embed", "figures"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(small_run, capsys, monkeypatch, command):
    monkeypatch.setattr(probe, "collect", None)  # would fail
    monkeypatch.setattr(probe, "similarity_figure", None)
    (small_run / "file").write_text("precious")
    words = [command, small_run / "run", small_run / "song0.wav"] if command else [small_run / "run"]
    out = small_run / "file" / "below" / ("x.npz" if command == "embed" else "")
    assert "Not a directory" in probe_main(capsys, *words, "--out", out)
    assert (small_run / "file").read_text() == "precious"


def test_a_file_cut_short_costs_only_itself_and_the_exit_status(small_run, capsys):
    broken = small_run / "cut.flac"
    soundfile.write(broken, noise(64000).numpy() / 9, 16000)
    broken.write_bytes(broken.read_bytes()[:40000])
    headless, rate = small_run / "noise.raw", small_run / "rate.wav"
    headless.write_bytes(bytes(range(256)) * 100)
    soundfile.write(rate, np.ones(64000) / 9, 16000)
    rate.write_bytes(rate.read_bytes()[:24] + (2_000_000_025).to_bytes(4, "little") + rate.read_bytes()[28:])
    songs = small_run / "song0.wav", broken, small_run / "song1.wav", headless, rate
    said = probe_main(capsys, "embed", small_run / "run", *songs, "--out", small_run / "two.npz")
    assert said == "probe: 3 of 5 files were left out: see above"
    assert probe_main(capsys, "embed", small_run / "run", broken) == "probe: no sound could be read"
    assert np.load(small_run / "two.npz")["names"].tolist() == [str(songs[i]) for i in (0, 0, 2, 2)]
    (small_run / "no sound.mp3").write_text("nor can it be opened")
    rows = ["cut.flac,a,test", "no sound.mp3,b,train"]
    rows += [f"song{i}.wav,{'ab'[i % 2]},{'test' if i > 3 else 'train'}" for i in range(6)]
    (small_run / "cut.csv").write_text("path,mood,split\n" + "\n".join(rows))
    flags = "--data", small_run / "cut.csv", "--task", "mood", "--out", small_run / "lost"
    assert probe_main(capsys, small_run / "run", *flags) == "probe: 2 of 8 files were left out: see above"
    rows = json.loads((small_run / "lost" / "results.json").read_text())
    assert {(r["n_train"], r["n_test"]) for r in rows} == {(4, 2)}


def test_test_files_that_cannot_be_read_do_not_replace_older_results(small_run, capsys):
    soundfile.write(small_run / "nan.wav", np.full(64000, np.nan), 16000, subtype="FLOAT")
    rows = "song0.wav,C major,train\nsong1.wav,A minor,train\nnan.wav,C major,test"
    (small_run / "lost.csv").write_text("path,key,split\n" + rows)
    (small_run / "kept").mkdir()
    (small_run / "kept" / "results.json").write_text("precious")
    flags = "--data", small_run / "lost.csv", "--task", "key", "--out", small_run / "kept"
    assert "too few files" in probe_main(capsys, small_run / "run", *flags)
    assert (small_run / "kept" / "results.json").read_text() == "precious"


@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_a_strength_of_decay_that_went_astray_is_not_chosen(wild, monkeypatch):
    x, y, fit = noise(1, 60, 3), F.one_hot(torch.arange(60) % 2).float(), probe.fit
    calm, loss, _ = probe.probe(x, y, x, y, False)
    monkeypatch.setattr(probe, "fit", lambda *a: torch.cat([fit(*a), fit(*a)[:, :1] * wild], 1))
    other, same, _ = probe.probe(x, y, x, y, False)
    assert torch.equal(loss, same) and torch.equal(calm(x), other(x))


@pytest.mark.parametrize("text, key", [("C major", 0), ("f# minor", 18), ("Cb:maj", 11), ("E# minor", 17)])
def test_a_key_may_be_spelt_in_any_way(text, key, tmp_path):
    assert probe.parse("key", text, tmp_path, None) == {key}


def test_spaces_around_tags_and_empty_tags_do_not_count(tmp_path):
    assert probe.parse("tags", "very slow | loud|", tmp_path, None) == {"very slow", "loud"}


def test_events_that_are_not_quite_in_order_are_sorted(tmp_path):
    (tmp_path / "a.beats").write_text("0.5\t1\n2.0 2 down\n1.9995\n\n3.0\n")  # not all have a position
    soundfile.write(tmp_path / "a.wav", noise(64000).numpy() / 9, 16000)
    for sound in ("a.wav", "lost.wav"):  # what cannot be opened is named later, when it is read
        assert probe.parse("beat", "a.beats", tmp_path, tmp_path / sound).tolist() == [0.5, 1.9995, 2, 3]


@pytest.mark.parametrize("kind, text", [("tempo", "9"), ("tempo", "1001"), ("beat", "2\n1\n"),
                                        ("onset", "-1\n"), ("chord", "1 0.5 C:maj\n")])
def test_labels_that_cannot_be_are_refused(kind, text, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match="is not 10 to 1000|empty or not labels"):
        probe.parse(kind, "file" if "\n" in text else text, tmp_path, tmp_path / "lost.wav")


def test_an_encoder_gets_one_line_for_features_that_are_no_numbers_and_probes_of_width_one(
        small_run, short_probe, capsys, monkeypatch):
    (small_run / "odd.py").write_text("nan = lambda wave: [0 / wave[:, :63488].unflatten(1, (-1, 512))]\n"
                                      "one = lambda wave: [wave[:, ::512, None]]\n")
    monkeypatch.syspath_prepend(small_run)
    said = probe_main(capsys, "--encoder", "odd:nan", "--task", "chord", "--out", small_run / "odd")
    assert "odd:nan, seq_avg: NaN or infinity" in said
    probe_main(capsys, "--encoder", "odd:one", "--task", "key,tags", "--out", small_run / "odd")
    rows = json.loads((small_run / "odd" / "results.json").read_text())
    assert {r["task"] for r in rows if r["encoder"] == "odd:one"} == {"key", "tags"}


def test_an_undefined_validation_score_costs_no_result(small_run, capsys):
    lines = ["path,onsets,split"]
    for i, part in enumerate(("train", "train", "train", "valid", "test", "test")):
        (small_run / f"{i}.onsets").write_text("8.2\n" if part == "valid" else "1.0\n2.0\n")
        lines.append(f"song{i}.wav,{i}.onsets,{part}")  # 8.2: just after the last frame
    (small_run / "undefined.csv").write_text("\n".join(lines))
    flags = "--data", small_run / "undefined.csv", "--task", "onsets", "--out", small_run / "undefined"
    said = probe_main(capsys, small_run / "run", *flags)
    rows = json.loads((small_run / "undefined" / "results.json").read_text())
    assert "f_measure" in said and any(row["valid_loss"] is None for row in rows)


def test_a_run_with_the_name_of_a_reference_is_refused(capsys):
    assert all("reference" in probe_main(capsys, name) for name in ("flux", "my attention"))
    assert "no such checkpoint" in probe_main(capsys, "my_flux")


@pytest.mark.parametrize("words", [["nowhere"], ["key", "nowhere", "x.wav"], ["--encoder", "muq:nowhere"],
                                   ["--encoder", "no_such_module:f"], ["--colour"], []])
def test_probe_refuses_what_is_not_there_in_one_line(capsys, words):
    assert probe_main(capsys, *words).startswith("probe: ")


@pytest.mark.parametrize("command, out", [("figures", "new"), ("embed", "new/features.npz")])
def test_a_run_that_is_not_there_leaves_no_folder_behind(command, out, small_run, capsys, tmp_path):
    said = probe_main(capsys, command, "nowhere", small_run / "song0.wav", "--out", tmp_path / out)
    assert "no such checkpoint" in said and not (tmp_path / "new").exists()


def test_ctrl_c_ends_a_probe_in_one_line(small_run, capsys, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt
    killed = []
    monkeypatch.setattr(probe, "cut", interrupt)
    monkeypatch.setattr(signal, "raise_signal", killed.append)
    probe.main(["key", str(small_run / "run"), str(small_run / "song0.wav")])
    at_end = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert at_end == signal.SIG_DFL and killed == [signal.SIGINT]  # so that a shell's loop stops as well
    assert capsys.readouterr().err.splitlines()[-1] == "probe: stopped"


def test_what_was_printed_before_ctrl_c_is_not_lost():
    work = "import sys, mt2; sys.stdout = open(1, 'w'); print('a table'); mt2.stop('stopped')"
    job = python("-c", work, cwd=HERE)
    assert job.communicate() == ("a table\n", "stopped\n") and job.returncode == -signal.SIGINT


def test_any_callable_is_an_encoder(small_run, short_probe, capsys, monkeypatch):
    (small_run / "my_encoder.py").write_text(
        "import torch\ndef layers(wave):\n"
        "    x = wave[:, :4000 * (wave.shape[1] // 4000)].unflatten(1, (-1, 4000))\n"
        "    return [x[..., :8].abs(), x[..., :4]]\nlayers.rate = 8000\n")
    monkeypatch.syspath_prepend(small_run)
    out = small_run / "foreign"
    probe_main(capsys, "--encoder", "my_encoder:layers", "--task", "key,chord", "--out", out)
    rows = [r for r in json.loads((out / "results.json").read_text()) if r["encoder"] == "my_encoder:layers"]
    assert {(r["task"], r["readout"], r["layer"]) for r in rows} == {
        ("key", "seq_avg", 0), ("key", "seq_avg", 1), ("chord", "seq", 0), ("chord", "seq", 1)}


def test_a_mixture_of_layers_has_rows_of_its_own_and_its_weights_are_printed(small_run, short_probe, capsys):
    out = small_run / "mix"
    said = probe_main(capsys, small_run / "run", "--mix", "--task", "key,onset", "--out", out)
    rows = [row for row in json.loads((out / "results.json").read_text()) if row["readout"].endswith(" mix")]
    names = {str(small_run / "run"), "untrained"}  # references have one layer, attention's curves no probe
    assert {(r["encoder"], r["task"], r["readout"]) for r in rows} == {
        (name, task, f"{readout} mix") for name in names
        for task, readout in (*(("key", r) for r in probe.READOUTS), ("onset", "seq"))}
    assert {row["layer"] for row in rows} == {0} and all(row["value"] is not None for row in rows)
    weights = [line.split(": ")[1].split() for line in said.splitlines() if line.startswith("layers of ")]
    assert len(weights) == 2 * 2 * 6  # systems, seeds, readouts
    assert all(len(w) == 2 and sum(map(float, w)) == pytest.approx(1, abs=0.02) for w in weights)


def test_an_encoder_may_yield_its_layers_and_a_module_is_frozen(monkeypatch):
    cut = lambda wave: wave.view(len(wave), -1, 500)
    module = torch.nn.Dropout()
    module.forward = lambda wave, drop=module.forward: [drop(cut(wave))]
    each, none = lambda wave: (cut(wave) for _ in range(3)), lambda wave: []
    monkeypatch.setitem(sys.modules, "odd", types.SimpleNamespace(module=module, each=each, none=none))
    wave = noise(2, 64000)
    assert probe.of_package("odd:each", "cpu")(wave)["seq"].shape == (3, 2, 126, 500)
    assert torch.equal(probe.of_package("odd:module", "cpu")(wave)["seq_avg"][0], cut(wave).mean(1))
    with pytest.raises(ValueError, match="or there is none"):
        probe.of_package("odd:none", "cpu")


def test_an_encoder_that_works_in_place_spoils_no_reference_and_may_fail_late_in_one_line(
        short_probe, capsys, monkeypatch, tmp_path):
    def spoil(wave):
        if len(wave) > 2 and late:
            raise KeyError("late")
        return [wave.mul_(0).view(len(wave), -1, 100)]
    plain = lambda wave: [wave.view(len(wave), -1, 100)]
    monkeypatch.setitem(sys.modules, "odd", types.SimpleNamespace(spoil=spoil, plain=plain))
    found = []
    for late, name in ((False, "spoil"), (False, "plain"), (True, "spoil")):
        said = probe_main(capsys, "--encoder", f"odd:{name}", "--task", "chord", "--out", tmp_path / name)
        rows = json.loads((tmp_path / name / "results.json").read_text())
        found.append([row["valid_loss"] for row in rows if row["encoder"] == "log-mel"])
    assert found[0] == found[1] and said.startswith("probe: --encoder odd:spoil: KeyError: 'late'")


@pytest.mark.parametrize("f", [lambda x: [x[:, :8]], lambda x: [x[:, :64].unflatten(1, (8, 8)).squeeze(0)]])
def test_an_encoder_that_forgets_frames_or_a_clip_alone_is_refused(f, short_probe, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flat", types.SimpleNamespace(f=f))
    said = probe_main(capsys, "--encoder", "flat:f", "--task", "key")
    assert said.startswith("probe: --encoder flat:f") and "[B, frames, dim]" in said


def hidden(wave):
    """Four layers of a 50 Hz encoder for waves at 24 kHz."""
    assert wave.shape[1] == 4 * 24000, "not resampled to the encoder's rate"
    frames = wave.unflatten(1, (200, 480))
    return [(layer + 1) * frames[..., :8] for layer in range(4)]


class Foreign(torch.nn.Module):
    """Stands for MuQ, transformers' AutoModel and MusicFM25Hz, as their packages define them."""

    def __init__(self, *args, **how):
        super().__init__()
        self.how = how

    @classmethod
    def from_pretrained(cls, folder, **how):
        assert Path(folder).is_dir() and not how.get("trust_remote_code"), "trusted"
        return cls()

    def forward(self, wave, output_hidden_states=False):
        assert output_hidden_states
        return types.SimpleNamespace(hidden_states=tuple(hidden(wave)))

    def get_predictions(self, wave):
        assert Path(self.how["stat_path"]).is_file() and Path(self.how["model_path"]).is_file()
        return None, hidden(wave)


class Extractor:
    """Stands for transformers' Wav2Vec2FeatureExtractor."""
    sampling_rate = 24000
    from_pretrained = classmethod(lambda cls, folder: cls())

    def __call__(self, waves, sampling_rate):
        return {"input_values": [(w - w.mean()) / (w.std() + 1e-7) for w in waves]}


@pytest.mark.parametrize("kind, module, content", [
    ("muq", "muq", dict(MuQ=Foreign)),
    ("mert", "transformers", dict(AutoModel=Foreign, Wav2Vec2FeatureExtractor=Extractor)),
    ("musicfm", "musicfm.model.musicfm_25hz", dict(MusicFM25Hz=Foreign))])
def test_foreign_encoders_are_called_as_their_packages_want_and_give_every_layer(
        kind, module, content, monkeypatch, tmp_path):
    for i in range(module.count(".") + 1):
        name = ".".join(module.split(".")[:i + 1])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vars(sys.modules[module]).update(content)
    (tmp_path / "msd_stats.json").write_text("{}")
    (tmp_path / "weights.pt").write_bytes(b"")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = probe.of_package(f"{kind}:{tmp_path}", "cpu")(noise(2, 64000))
    assert found["seq_avg"].shape == (4, 2, 8) and found["seq"].shape == (4, 2, 126, 8)
    assert_close(found["seq"][3], 4 * found["seq"][0])
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # a folder asks no network
    with pytest.raises(ValueError, match="no such folder; or add --download"):
        probe.of_package(f"{kind}:{tmp_path}/nowhere", "cpu")
    with pytest.raises(ValueError, match="trusted") if kind == "mert" else contextlib.nullcontext():
        probe.of_package(f"{kind}:{tmp_path}", "cpu", trust=True)


@pytest.mark.parametrize("kind, module, remedy", [
    ("muq", "muq", "pip install muq"), ("mert", "transformers", "--trust-remote-code"),
    ("musicfm", "musicfm", "--download once")])
def test_a_foreign_encoder_that_fails_says_what_it_needs(kind, module, remedy, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)  # not installed
    with pytest.raises(ValueError, match=f"{kind}:.*{module}.*{remedy}") as caught:
        probe.of_package(f"{kind}:{tmp_path}", "cpu")
    assert "'transformers<5'" in str(caught.value)


def test_muq_itself_runs_with_random_weights(tmp_path):
    muq, transformers = pytest.importorskip("muq"), pytest.importorskip("transformers")
    plain = transformers.Wav2Vec2ConformerConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128,
                                                 position_embeddings_type="rotary").to_dict()
    plain = {k: v for k, v in plain.items() if isinstance(v, (int, float, str, list, type(None)))}
    config = muq.MuQConfig(encoder_depth=3, encoder_dim=64, conv_dim=32,
                           w2v2_config=plain | {"_attn_implementation": "eager"},
                           stat={"melspec_2048_mean": 0.0, "melspec_2048_std": 1.0})
    muq.MuQ(config).save_pretrained(tmp_path)
    found = probe.of_package(f"muq:{tmp_path}", "cpu")(noise(2, 64000))
    assert found["seq_avg"].shape == (4, 2, 64) and found["seq"].isfinite().all()


def test_an_empty_cell_is_no_label_and_a_label_may_lie_half_a_second_behind_the_end(tmp_path):
    columns = dict(key="C major", tempo="100", tags="a|b", mood="calm", onsets="late.txt")
    for i in range(6):  # all labels, then one each
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(16000), 16000)
    rows = [f"{i}.wav,{','.join(v if i in (0, j + 1) else '' for j, v in enumerate(columns.values()))}"
            for i in range(6)]
    header = f"path,{','.join(columns)}\n"
    (tmp_path / "m.csv").write_text(header + ",\n".join(rows) + ",")  # a comma too many in each
    for late in (1.4, 1.6):
        (tmp_path / "late.txt").write_text(str(late))
        refused = pytest.raises(ValueError, match="sound ends at 1.00 s")
        with refused if late > 1.5 else contextlib.nullcontext():
            _, truth, _ = probe.manifest(tmp_path / "m.csv", list(columns), for_probe=False)
    for j, (name, labels) in enumerate(truth.items()):
        assert [v is not None for v in labels] == [i in (0, j + 1) for i in range(6)], name


def test_keys_of_a_manifest_are_compared_with_its_labels(small_run, capsys, monkeypatch):
    one_hot = torch.eye(12)
    monkeypatch.setattr(mt2, "calibrate", lambda *_: one_hot[0])
    y = torch.stack([one_hot[0], 0.1 * one_hot[7] + 0.9 / 12])  # a window of C major, a weak one of G major
    monkeypatch.setattr(mt2, "key_profile", lambda *_: y.expand(5, 2, 12))
    keys = ("C major", "A minor", "G major", "F# major")
    lines = "path,key", *(f"song{i}.wav,{key}" for i, key in enumerate(keys))
    (small_run / "keys.csv").write_text("\n".join(lines))
    probe.main(["key", str(small_run / "run"), "--data", str(small_run / "keys.csv"), "--csv"])
    said = capsys.readouterr()
    assert said.out.count("C major,A minor,0.97") == 4
    assert "0.500 right, 0.750 within a fifth, of 4 files; 0.375 right of their 4 s windows" in said.err
    (small_run / "keys.csv").write_text("path,key\nsong0.wav,G major")  # no probe, so one file is enough
    probe.main(["key", str(small_run / "run"), "--data", str(small_run / "keys.csv")])
    assert "0.000 right, 1.000 within a fifth, of 1 files" in capsys.readouterr().err
    (small_run / "keys.csv").write_text("path,key\nsong0.wav,")
    said = probe_main(capsys, "key", small_run / "run", "--data", small_run / "keys.csv")
    assert said.endswith("no file has a key")


def test_a_key_is_read_at_twelve_crops_and_its_confidence_is_their_agreement(small_run, capsys, monkeypatch):
    seen, one_hot = [], torch.eye(12)
    y = torch.stack([one_hot[0], 0.1 * one_hot[9] + 0.9 / 12])  # C major at six crops, a hint of A at six
    y = y.repeat_interleave(6, 0)[:, None].expand(12, 2, 12)
    monkeypatch.setattr(mt2, "calibrate", lambda *given: seen.append(given[2]) or one_hot[0])
    monkeypatch.setattr(mt2, "key_profile", lambda *given: seen.append(given[2]) or y)
    said = probe_main(capsys, "key", small_run / "run", small_run / "song0.wav", "--csv")
    assert said.endswith("song0.wav,C major,A minor,0.71\n")  # of two phases a right angle apart
    assert seen[0] == seen[1] and sorted(c % 12 for c in seen[0]) == list(range(12))


def test_two_probes_may_write_to_one_file_at_once(tmp_path, monkeypatch):
    def save(file):
        monkeypatch.setattr(os, "getpid", lambda: -1)  # the other
        probe.write(tmp_path / "a.json", lambda file: file.write(b"theirs"))
        file.write(b"mine")
    probe.write(tmp_path / "a.json", save)
    assert files_of(tmp_path) == {"a.json": b"mine"}


def test_what_cannot_be_written_is_named_and_leaves_no_half_file(tmp_path):
    (tmp_path / "a.json").write_bytes(b"old")
    with pytest.raises(OSError, match=r"a\.json: cannot be written \(.*No space left"):
        probe.write(tmp_path / "a.json", lambda file: file.write(b"half") and disk_full())
    assert files_of(tmp_path) == {"a.json": b"old"}


def test_a_place_where_nothing_can_be_written_is_named_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("words")
    with pytest.raises(OSError, match=r"--out .*file: cannot be written \(File exists\); name another"):
        probe.ready(tmp_path / "file")
    with pytest.raises(OSError, match=r"run/log.csv: cannot be written \(Not a dir.*; name another --out"):
        mt2.open_log(tmp_path / "file" / "run" / "log.csv", ("step",), 0)


def test_an_error_without_words_is_named_by_its_kind(monkeypatch, capsys):
    def fail(name):
        raise OSError
    monkeypatch.setattr(mt2, "pick_device", fail)
    assert run_main(monkeypatch, capsys) == ("mt2: OSError", ["mt2: OSError"])
    assert probe_main(capsys, "key", "run", "song.wav") == "probe: OSError"


def test_names_of_runs_need_not_be_text_to_be_drawn(tmp_path):
    row = dict(encoder="runs/\udcff", task="key", readout="eq", layer=0, metric="accuracy", value=0.5,
               std=0.1, valid_loss=1.0)
    probe.draw(tmp_path / "layers.png", probe.layers_figure([row, row | {"layer": 1}]))
    assert (tmp_path / "layers.png").stat().st_size > 1000


@pytest.mark.parametrize("header", ["path, split,key", "path,Split ,key", " path,SPLIT,key "])
def test_a_split_is_respected_however_its_header_is_written(header, small_run):
    rows = [f"song{i}.wav,{part},C major" for i, part in enumerate(("test", "train", "valid"))]
    rows += ["song3.wav,train,A minor"]
    (small_run / "odd.csv").write_text("\n".join([header, *rows]))
    parts = probe.manifest(small_run / "odd.csv", ["key"])[2]["key"]
    assert [part.tolist() for part in parts] == [[1, 3], [2], [0]]
    (small_run / "odd.csv").write_text("\n".join([f"{header},split", *rows]))
    with pytest.raises(ValueError, match="at most one column 'split'"):
        probe.manifest(small_run / "odd.csv", ["key"])


def test_a_column_may_be_written_in_capitals(small_run, short_probe, capsys):
    (small_run / "a.beats").write_text("1\n3\n5\n")
    rows = [f"song{i}.wav,{'CD'[i % 2]} major,a.beats,{'test' if i > 3 else 'train'}" for i in range(6)]
    (small_run / "caps.csv").write_text("\n".join(["path,Key,BEATS,split", *rows]))
    flags = "--data", small_run / "caps.csv", "--task", "Key,BEATS", "--out", small_run / "caps"
    probe_main(capsys, small_run / "run", *flags)
    rows = json.loads((small_run / "caps" / "results.json").read_text())
    assert {(row["task"], row["metric"]) for row in rows} == {
        ("key", "accuracy"), ("key", "mirex"), ("beats", "f_measure")}


def test_a_column_that_cannot_be_trained_or_scored_is_named(small_run, capsys):
    few = [f"song{i}.wav,{tag},{part}" for i, (tag, part) in enumerate([
        ("a", "train"), ("b|a", "train"), ("b", "train"), ("a", "valid"), ("a", "test"), ("a", "test")])]
    (small_run / "few.csv").write_text("\n".join(["path,tags,split", *few]))
    flags = "--data", small_run / "few.csv", "--task", "tags", "--out", small_run / "few"
    said = probe_main(capsys, small_run / "run" / "model.pt", *flags)
    assert said == "probe: column ['tags']: no metric can score its test files"
    assert json.loads((small_run / "few" / "results.json").read_text())[0]["value"] is None
    task = probe.clip_task("mood", [{"a"}, {"b"}], torch.arange(2))
    with pytest.raises(ValueError, match="column 'mood': too little"):
        probe.evaluate(torch.ones(1, 2, 3), task, torch.arange(2).split((1, 1, 0)), "cpu")


def test_results_of_a_model_file_lie_beside_it_as_those_of_its_run(small_run, monkeypatch):
    seen = []
    shutil.copy(small_run / "run" / "model.pt", small_run / "copy.pt")
    monkeypatch.setattr(probe, "measure", lambda models, others, args, device: seen.append(args.out))
    for words in ([small_run / "run"], [small_run / "run" / "model.pt"],
                  [small_run / "run", small_run / "copy.pt"], [small_run / "copy.pt"],
                  [small_run / "run" / "model.pt", "--data", "x/songs.csv"]):
        probe.main([*map(str, words)])
    assert [Path(out) for out in seen] == [small_run / "run"] * 3 + [small_run, small_run / "run" / "songs"]


def test_key_asks_for_no_split_that_probes_know(small_run):
    (small_run / "dev.csv").write_text("path,key,split\nsong0.wav,C major,dev")
    assert probe.manifest(small_run / "dev.csv", ["key"], for_probe=False)[1] == {"key": [{0}]}
    with pytest.raises(ValueError, match="'dev'. is not train"):
        probe.manifest(small_run / "dev.csv", ["key"])


def test_silence_in_a_song_has_no_say_in_its_key(small_run, capsys):
    song = soundfile.read(small_run / "song0.wav")[0][:64000]
    soundfile.write(small_run / "plain.wav", song, 16000)
    soundfile.write(small_run / "gaps.wav", np.concatenate([np.zeros(64000), song, np.zeros(320000)]), 16000)
    songs = small_run / "plain.wav", small_run / "gaps.wav"
    said = probe_main(capsys, "key", small_run / "run", *songs, "--csv")
    _, plain, gaps = [line.split(",")[1:] for line in said.splitlines() if ".wav," in line or "file," in line]
    assert plain == gaps


def test_embed_replaces_only_npz(small_run, capsys):
    song = small_run / "song0.wav"
    before = song.read_bytes()
    said = probe_main(capsys, "embed", small_run / "run", small_run / "song1.wav", "--out", song)
    assert "ends in .npz" in said and song.read_bytes() == before
    (small_run / "folder.npz").mkdir()
    said = probe_main(capsys, "embed", small_run / "run", song, "--out", small_run / "folder.npz")
    assert "must be a file that ends in .npz" in said


def test_key_names_a_broken_song_goes_on_and_ends_with_an_error(small_run, capsys):
    (small_run / "text.wav").write_text("no sound")
    soundfile.write(small_run / "vast.wav", 1e24 * noise(64000).numpy(), 16000, "FLOAT")
    soundfile.write(small_run / "silent.wav", np.zeros(64000), 16000)
    odd = os.fsencode(small_run) + b"/caf\xe9.wav"  # a name that is no text
    Path(os.fsdecode(odd)).write_bytes((small_run / "song1.wav").read_bytes())
    songs = [small_run / f"{name}.wav" for name in ("song0", "text", "vast", "silent")] + [os.fsdecode(odd)]
    with pytest.raises(SystemExit, match="3 of 5 files"):
        probe.main(list(map(str, ["key", small_run / "run", *songs])))
    said = capsys.readouterr()
    for what in ("text.wav: not a sound", "vast.wav: holds no sound, or NaN", "silent.wav: holds no sound"):
        assert what in said.err
    assert re.search(r"song0.wav\n.*caf\\udce9.wav", said.out)


@pytest.mark.parametrize("name, encoding, shown", [
    ("björk.wav", "ascii", "bj\\xf6rk.wav"),
    (os.fsdecode(b"bj\xf6rk.wav"), "utf-8", "bj\\udcf6rk.wav")])  # a name that is no text
@pytest.mark.parametrize("program, flags", [
    ("probe.py", "key run"), ("mt2.py", "--data . --easy 0 --tasks con --inputs mel --out new")])
def test_a_name_that_the_screen_cannot_show_stops_nothing(
        program, flags, name, encoding, shown, small_run, tmp_path, monkeypatch):
    shutil.copytree(small_run / "run", tmp_path / "run")
    shutil.copy(small_run / "song0.wav", tmp_path)
    flags = [*flags.split(), name, "song0.wav"] if program == "probe.py" else FLAGS + flags.split()
    sound = (small_run / "song1.wav").read_bytes() if program == "probe.py" else b"no sound"
    (tmp_path / name).write_bytes(sound)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setattr(sys, "argv", [program, *flags])
    runpy.run_path(str(HERE / program), run_name="__main__")
    sys.stdout.flush()
    said = sys.stdout.buffer.getvalue().decode()
    assert shown in said and ("song0.wav" in said or program == "mt2.py")


def test_key_embed_and_figures_write_what_they_say(small_run, capsys, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "savefig.format", "pdf")  # a user's own setting
    songs = small_run / "song0.wav", small_run / "song1.wav"
    said = probe_main(capsys, "key", small_run / "run", "--csv", *songs)
    lines = said.strip().splitlines()
    assert lines[0] == "file,major,minor,confidence" and len(lines) == 3 and "major" in lines[1]
    probe_main(capsys, "embed", small_run / "run", small_run / "song0.wav", "--out", small_run / "f.npz")
    found = np.load(small_run / "f.npz")
    assert found["eq"].shape == (2, 2, 24) and found["times"].tolist() == [0, 4]
    soundfile.write(small_run / "short.wav", noise(64000).numpy() / 9, 16000)
    probe_main(capsys, "embed", small_run / "run", small_run / "short.wav", "--out", small_run / "one.npz")
    assert np.load(small_run / "one.npz")["names"].tolist() == [str(small_run / "short.wav")]
    assert set(probe.READOUTS) <= set(found)
    with torch.no_grad():
        wave = torch.from_numpy(soundfile.read(small_run / "song0.wav", dtype="float32")[0]).view(2, 64000)
        layers = load(small_run / "run").layers(wave)
    average = torch.from_numpy(found["cls_avg"])
    assert_close(average, layers[:, :, :2].mean(2), rtol=1e-3, atol=1e-4)
    probe_main(capsys, "figures", small_run / "run", small_run / "song0.wav", "--out", small_run / "fig")
    assert {p.name for p in (small_run / "fig").iterdir()} == {"ssm.png", "attention.png", "circle.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (small_run / "fig").iterdir())
    said = probe_main(capsys, "figures", small_run / "run", "no.wav", "--out", small_run / "none")
    assert said.startswith("probe: no.wav: no such file") and not (small_run / "none").exists()
    said = probe_main(capsys, "figures", small_run / "run", small_run, "--out", small_run / "none")
    assert said.startswith(f"probe: {small_run}: no such file; name sound files, not folders")


def test_the_circle_shows_g_major_a_fifth_clockwise_of_c(known):
    waves = noise(2, 64000)
    windows = waves.flatten().unfold(0, 64000, 16000)  # one a second
    heard = torch.cat([windows, known[2].flatten(0, 1)])
    oracle = Oracle(heard, torch.cat([torch.full((5,), 7), known[3]]), turn=4)
    ax = probe.circle_figure(oracle, waves).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_xdata() % (2 * math.pi), 5 * [math.pi / 6], atol=1e-5)
    cells = np.asarray(ax.collections[0].get_array()).reshape(5, 12, 9)
    assert cells.argmax(1).tolist() == [9 * [1]] * 5 and ax.get_theta_direction() == -1
    assert [x.get_text() for x in ax.get_xticklabels()][:4] == ["C/a", "G/e", "D/b", "A/f#"]


def test_pictures_show_centred_similarity_in_order_and_heads_block_by_block():
    net, waves = model(depth=2), noise(2, 64000)[[0, 1, 0]]
    with torch.no_grad():
        ssm = [ax.images[0].get_array() for ax in probe.similarity_figure(net, waves).axes if ax.images][0]
        drawn = probe.attention_figure(net, waves[:1]).axes[1].images[0].get_array()
        paid = probe.attention(net, waves[:1])["eq"][:, 0].flatten(0, 1)  # [blocks x heads, frames]
    np.testing.assert_allclose(ssm[:25, 50:75].diagonal(), 1, atol=1e-4)  # the third window is the first
    assert ssm.shape == (75, 75) and ssm.min() < -0.1
    np.testing.assert_allclose(drawn, paid / paid.amax(1, keepdim=True), atol=1e-5)


# ---- README ----------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()
PIECES = {  # how a copied piece is used
    "nt_xent": lambda copy: copy["nt_xent"](noise(4, 8), noise(4, 8, seed=1)).isfinite(),
    "cpsd": lambda copy: copy["cpsd"](torch.eye(12), torch.eye(12).roll(3, 1), 3) < 1e-9,
    "VQT": lambda copy: copy["VQT"]()(noise(1, 64000)).shape == (1, 126, 99),
    "MT2": lambda copy: copy["MT2"](copy["Config"]())(noise(2, 64000)).y.shape == (2, 12),
    "TUNe": lambda copy: copy["TUNe"](tiny(encoder="tune"))(noise(2, 64000)).shape == (2, 64),
    "SyntheticMusic": lambda copy: copy["SyntheticMusic"](0).batch(1, 0)[0].shape == (1, 2, 64000)}


@pytest.mark.parametrize("file", ["mt2.py", "probe.py", "test_mt2.py"])
def test_the_file_table_of_the_readme_counts_and_points_right(file):
    lines = (HERE / file).read_text().splitlines()
    _, count, what = re.search(rf"\| (`{file}`) \| (\d+) \| (.*) \|", README).groups()
    assert len(lines) == int(count), len(lines)
    for place in re.findall(r"[^,]+ (\d+)", what):
        assert lines[int(place) - 1].startswith(("# ----", "class ")), place


@pytest.mark.parametrize("file", ["mt2.py", "probe.py", "test_mt2.py"])
def test_the_oldest_python_that_the_readme_names_can_read_the_code(file):
    oldest = re.search(r"Python (\d+)\.(\d+) or newer", README).groups()
    tree = ast.parse((HERE / file).read_text(), feature_version=tuple(map(int, oldest)))
    for node in ast.walk(tree):  # x[a, *b] came with 3.11, and ast lets it pass
        inside = getattr(getattr(node, "slice", None), "elts", ())
        assert not any(isinstance(part, ast.Starred) for part in inside), node.lineno


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_works_alone_when_copied_as_the_readme_says(piece):
    line = next(line for line in README.splitlines() if line.startswith(f"| `{piece}` |"))
    *names, imports = re.findall("`(.+?)`", line)
    whole, copy = ast.parse((HERE / "mt2.py").read_text()), {"__name__": "pasted"}
    defined = lambda node: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if isinstance(
        node, ast.Assign) else {getattr(node, "name", None)}
    parts = [node for node in whole.body if defined(node) & set(names)]
    sys.modules["pasted"] = types.ModuleType("pasted")  # dataclasses look their module up
    exec(imports + "\n" + ast.unparse(ast.Module(parts, [])), copy)
    assert PIECES[piece](copy)


def test_the_readme_python_block_runs(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(small_run / "run")
    for block in re.findall("```python\n(.*?)```", README, re.S):
        exec(block, {})


COMMANDS = [words for words in (line.split("#")[0].split() for line in README.splitlines())
            if words and words[0] in ("python", "torchrun") and len(words) > 1]


@pytest.fixture(scope="module")
def newcomer(small_run, tmp_path_factory):
    """A folder with everything that the README's commands name."""
    home = tmp_path_factory.mktemp("home")
    train(tiny(home / "runs" / "demo", steps=1))
    (home / "my_music").mkdir()
    for name in ("song.ogg", "other.mp3", "my_music/a.flac", "my_music/b.wav", "c.wav", "d.wav"):
        soundfile.write(home / name, soundfile.read(small_run / "song0.wav")[0], 16000)
    rows = [f"{name},{label},g{label[0]},song.lab\n" for name, label in
            zip(("song.ogg", "other.mp3", "c.wav", "d.wav"), ("C major", "A minor", "C major", "A minor"))]
    (home / "manifest.csv").write_text("path,key,genre,chords,split\n" + "".join(
        row.replace("\n", f",{part}\n") for row, part in zip(rows, ("train", "train", "test", "test"))))
    (home / "song.lab").write_text("0 4 C:maj\n4 8 A:min\n")
    encoder = "my_encoder = lambda wave: [wave[:, :63488].unflatten(1, (-1, 512))]\n"
    (home / "my_module.py").write_text(encoder)
    return home


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_the_readme_runs(words, newcomer, short_probe, monkeypatch, capsys):
    monkeypatch.chdir(newcomer)
    monkeypatch.syspath_prepend(newcomer)
    monkeypatch.setattr(mt2, "Config", lambda **how: tiny(**how)) if "ablation" in words else None
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    flags = words[script + 1:]
    if words[script] == "mt2.py":  # torchrun: in one process here, the ranks have tests of their own
        flags += [] if "--out" in flags else ["--out", "runs/first"]  # runs/demo is there, of another size
        few = ["--steps=2"] if "tune" in flags else []  # which is slow
        code, lines = run_main(monkeypatch, capsys, *flags, *FLAGS[:-1], *few)
        assert code == 0, lines
    elif words[script] == "probe.py":
        said = probe_main(capsys, *flags, *(["--steps", 1, "--seeds", 1] if "ablation" in flags else []))
        assert not said.startswith("probe: "), said


# ---- Benchmark: python test_mt2.py -----------------------------------------------------------------------

def clock(run):
    """Seconds of run's second call: by then caches and threads are its own, not its rival's."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    run()
    sync()
    begin = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - begin


def race(title, runners, repeats=9):
    """Time runners {name: function} in turns, so that all meet the same machine; print and return medians."""
    seconds = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            seconds[name].append(clock(run))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    print(f"\n{title}")
    for name, median in medians.items():
        print(f"  {name:34} {1000 * median:10.2f} ms   x {median / first:.2f}", flush=True)
    return medians


def installed(module):
    """The module, or None and a note."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"\nwithout {module}: {error}")


def compiler():
    """The C++ compiler that torch.compile needs, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def benchmark_vqt(device):
    wave = noise(32, 64000).to(device)
    runners = {"mt2.VQT": VQT().to(device)}
    settings = dict(sr=16000, hop_length=512, fmin=27.5, n_bins=99, bins_per_octave=12, verbose=False)
    for name in ("CQT1992v2", "CQT2010v2", "VQT"):
        if found := installed("nnAudio.features." + name[:3].lower()):
            runners[f"nnAudio {name}"] = getattr(found, name)(**settings).to(device)
    calls = {name: lambda f=f: f(wave) for name, f in runners.items()}
    if librosa := installed("librosa"):
        settings = dict(sr=16000, hop_length=512, fmin=27.5, n_bins=96, gamma=0)  # it refuses bins near 8 kHz
        calls["librosa.vqt, 96 bins"] = lambda: librosa.vqt(wave.cpu().numpy(), **settings)
    with torch.no_grad():
        race("VQT of 32 clips of 4 s, 99 bins", calls, repeats=9)


def triton_nt_xent(tile):
    """NT-Xent with its inner loops in Triton: a rival, kept out of mt2.py until a GPU has shown its gain.

    tile: rows of a program, and columns that it takes at a time; it walks over all, and writes only row sums
    or gradients. The width of z must be a power of two, at least 16. tf32x3: three products on tensor cores,
    nearly float32."""
    import triton
    import triton.language as tl

    @triton.jit
    def row_sums(z, sums, scale, n: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row, p = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, P)
        z_i = tl.load(z + row[:, None] * P + p, mask=row[:, None] < n, other=0.0)  # [ROWS, P]
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, n, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            z_j = tl.load(z + column[:, None] * P + p, mask=column[:, None] < n, other=0.0)  # [COLUMNS, P]
            e = tl.exp(scale * (tl.dot(z_i, tl.trans(z_j), input_precision="tf32x3") - 1))
            total += tl.sum(tl.where((row[:, None] != column) & (column < n), e, 0.0), 1)
        tl.store(sums + row, total, mask=row < n)

    @triton.jit
    def gradient(z, inverse, dz, scale, n: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):
        row, p = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, P)
        z_i = tl.load(z + row[:, None] * P + p, mask=row[:, None] < n, other=0.0)
        inverse_i = tl.load(inverse + row, mask=row < n, other=0.0)
        total = tl.zeros((ROWS, P), tl.float32)
        for start in range(0, n, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            z_j = tl.load(z + column[:, None] * P + p, mask=column[:, None] < n, other=0.0)
            inverse_j = tl.load(inverse + column, mask=column < n, other=0.0)
            e = tl.exp(scale * (tl.dot(z_i, tl.trans(z_j), input_precision="tf32x3") - 1))
            g = tl.where(row[:, None] == column, 0.0, (inverse_i[:, None] + inverse_j) * e)  # S + S^T
            total += tl.dot(g, z_j, input_precision="tf32x3")
        tl.store(dz + row[:, None] * P + p, total, mask=row[:, None] < n)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, t):
            sums, ctx.t = z.new_empty(len(z)), t
            row_sums[triton.cdiv(len(z), tile[0]),](z, sums, 1 / t, *z.shape, *tile)
            ctx.save_for_backward(z, sums)
            a, b = z.chunk(2)
            return sums.log().mean() + (1 - (a * b).sum(1).mean()) / t

        @staticmethod
        def backward(ctx, grad):
            z, sums = ctx.saved_tensors
            dz = torch.empty_like(z)
            gradient[triton.cdiv(len(z), tile[0]),](z, 1 / sums, dz, 1 / ctx.t, *z.shape, *tile)
            return grad / (len(z) * ctx.t) * (dz - 2 * z.roll(len(z) // 2, 0)), None
    return lambda a, b, t=0.1: Loss.apply(F.normalize(torch.cat([a, b])), t)


TRITON = """
import os
os.environ["TRITON_INTERPRET"] = "1"  # runs kernels without a GPU
import torch, test_mt2
for B, P, t, tile in ((2, 16, 0.1, (64, 64)), (37, 32, 0.5, (64, 32)), (100, 16, 0.1, (64, 64))):
    a, b = (test_mt2.noise(B, P, seed=s).requires_grad_() for s in (0, 1))
    theirs, plain = test_mt2.triton_nt_xent(tile)(a, b, t), test_mt2.autograd_nt_xent(a, b, t)
    torch.testing.assert_close(theirs, plain)
    torch.testing.assert_close(torch.autograd.grad(theirs, (a, b)), torch.autograd.grad(plain, (a, b)))
"""


def test_the_triton_version_that_the_benchmark_times_equals_the_formula():
    pytest.importorskip("triton")  # comes with torch on Linux
    done = python("-c", TRITON, cwd=HERE)
    complaint = done.communicate()[1]
    assert done.returncode == 0, complaint


def benchmark_losses(device):
    lightly, metric, triton = map(installed, ("lightly.loss", "pytorch_metric_learning.losses", "triton"))
    for B in (128, 512, 1024, 4096):
        a, b = (noise(B, 128, seed=s).to(device).requires_grad_() for s in (0, 1))
        losses = {"mt2.nt_xent": lambda a, b: nt_xent(a, b, 0.1), "naive formula": autograd_nt_xent}
        if lightly:
            losses["lightly NTXentLoss"] = lightly.NTXentLoss(temperature=0.1)
        for tile in ((64, 64), (64, 32), (32, 32)) if triton and device.type == "cuda" else ():
            rival = triton_nt_xent(tile)
            with contextlib.suppress(triton.OutOfResources):  # a tile too large for this GPU is left out
                torch.autograd.grad(rival(a, b), (a, b))
                losses[f"in Triton, tiles {tile}"] = rival
        calls = {name: lambda f=f: torch.autograd.grad(f(a, b), (a, b)) for name, f in losses.items()}
        repeats = 3 if B > 2000 else 9 if B > 200 else 49
        race(f"NT-Xent forward and backward, B = {B}, width 128", calls, repeats)
        if metric and B == 128:  # it lists every negative pair: alone, as it empties caches; minutes at 512
            labels = torch.arange(B, device=device).repeat(2)
            theirs = lambda: metric.NTXentLoss(0.1)(torch.cat([a, b]), labels)
            race("the same", {"pytorch-metric-learning": lambda: torch.autograd.grad(theirs(), (a, b))}, 3)
    y_a, y_b = (noise(128, 12, seed=s).to(device).requires_grad_() for s in (0, 1))
    k = torch.arange(128, device=device) % 12
    losses = {"mt2.cpsd": cpsd, "complex numbers": complex_cpsd}
    if compiler():
        losses["mt2.cpsd, compiled"] = torch.compile(cpsd)
    calls = {name: lambda f=f: torch.autograd.grad(f(y_a.softmax(1), y_b.softmax(1), k), (y_a, y_b))
             for name, f in losses.items()}
    race("CPSD forward and backward, B = 128", calls, repeats=99)


MEMORY = """
import re, sys, time, torch, test_mt2
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # MB; Linux
loss = getattr(test_mt2, sys.argv[1])
a, b = (torch.randn(int(sys.argv[2]), 128, requires_grad=True) for _ in range(2))
torch.autograd.grad(loss(a[:600], b[:600]), (a, b))  # libraries are loaded
before, begin = peak(), time.perf_counter()
torch.autograd.grad(loss(a, b), (a, b))
print(f"{peak() - before:10,.0f} MB beyond its inputs   {time.perf_counter() - begin:8.2f} s")
"""


def benchmark_memory():
    """Peak memory of NT-Xent forward and backward on CPU, each in a process of its own."""
    print("\nNT-Xent forward and backward on CPU, width 128: peak extra memory")
    for name, B in (("autograd_nt_xent", 4096), ("nt_xent", 4096), ("nt_xent", 16384), ("nt_xent", 65536)):
        done = python("-c", MEMORY, name, B, cwd=HERE)
        print(f"  {name:18} B = {B:6} {(done.communicate()[0] or 'failed').strip()}", flush=True)


class Encoder(torch.nn.Module):
    """nn.TransformerEncoder behind the interface of our blocks."""
    def __init__(self, layer, depth):
        super().__init__()
        self.layers = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x, first=None):
        return self.layers(x)[:, :first]


def assembled(config, device):
    """The same model from others' parts: nn.TransformerEncoder for the blocks, nnAudio for the VQT."""
    torch.manual_seed(0)
    net = MT2(config)
    layer = torch.nn.TransformerEncoderLayer(config.dim, config.heads, 4 * config.dim, dropout=0.0,
                                             activation="gelu", batch_first=True, norm_first=True)
    net.blocks = torch.nn.ModuleList([Encoder(layer, config.depth)])
    front = mt2.FrontEnd()
    vqt = importlib.import_module("nnAudio.features.cqt").CQT1992v2(
        sr=16000, hop_length=512, fmin=27.5, n_bins=99, bins_per_octave=12, verbose=False)
    front.vqt.magnitude = lambda wave: vqt(wave).transpose(1, 2)
    return net.to(device).train(), front.to(device)


def training_step(net, front, waves, data, compiled=False):
    """What one step of the loop costs: spectra of the fresh tracks, then losses, backward, AdamW."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    encode = torch.compile(net.encode, dynamic=False) if compiled else None

    def step():
        front(waves)
        optimizer.zero_grad()
        terms = mt2.losses(net, data, seeded(0), encode)
        (terms["nt_xent"] + 3 * terms["cpsd"]).backward()
        optimizer.step()
    return step


def parts_of_a_step(net, batch, fresh, waves):
    """What is not views and transformer; workers make music and its spectra while the model computes."""
    device, music, front = waves.device, SyntheticMusic(0), mt2.FrontEnd().to(waves.device)
    z, logits = (noise(n * batch, width).to(device).requires_grad_() for n, width in ((2, 64), (3, 12)))
    k, optimizer = torch.arange(batch, device=device) % 12, torch.optim.AdamW(net.parameters(), fused=True)

    def both_losses():
        y_a, y_b, y_shift = logits.softmax(1).chunk(3)
        loss = cpsd(y_a, y_b, k) + cpsd(y_a, y_shift, k) + cpsd(y_b, y_shift, k)
        torch.autograd.grad(loss + nt_xent(*z.chunk(2)), (z, logits))
    return {f"music, {fresh} tracks (a worker's)": lambda: music.batch(fresh, 0),
            "spectra of them (a worker's)": lambda: front(waves),
            "NT-Xent and CPSD alone": both_losses, "AdamW alone": optimizer.step}


def benchmark_step(device):
    """A training step: against the same model from others' parts, and as a share of matrix products."""
    from torch.utils.flop_counter import FlopCounterMode
    n = 8192 if device.type == "cuda" else 2048
    square = torch.randn(n, n, device=device)
    products = {f"{str(m.dtype)[6:]} product {n} x {n}": lambda m=m: m @ m
                for m in (square, square.bfloat16())}
    with mt2.autocast(device):
        used = f"{str((square[:2] @ square).dtype)[6:]} product {n} x {n}"
    db = lambda *shape: (20 * torch.randn(shape, device=device) - 60).half()
    music = lambda batch: [db(batch, 2, 126, bins) for bins in (128, 99)]
    lightly, nnaudio = installed("lightly.loss"), installed("nnAudio.features.cqt")
    sizes = [("demo", 128, 16), ("paper", 16, 2)]
    if device.type == "cuda":
        sizes.append(("paper", 128, 16))
    for size, batch, fresh in sizes:
        torch.manual_seed(0)
        config = Config(size=size)
        net, data, waves = MT2(config).to(device).train(), music(batch), noise(2 * fresh, 64000).to(device)
        ours = training_step(net, mt2.FrontEnd().to(device), waves, data)
        steps = {"mt2: spectra, losses, AdamW": ours}
        if compiler():
            steps["mt2, --compile 1"] = training_step(net, mt2.FrontEnd().to(device), waves, data, True)
        if lightly and nnaudio:
            other, fast = (training_step(*assembled(config, device), waves, data, c) for c in (False, True))

            def theirs(step=other, kept=(mt2.nt_xent, mt2.cpsd)):
                mt2.nt_xent, mt2.cpsd = lambda a, b, t: lightly.NTXentLoss(t)(a, b), complex_cpsd
                step()
                mt2.nt_xent, mt2.cpsd = kept

            def as_they_come(kept=mt2.autocast):  # float32, as nothing in those parts asks for less
                mt2.autocast = lambda device: torch.autocast(device.type, enabled=False)
                theirs()
                mt2.autocast = kept
            steps |= {"from others' parts, our autocast": theirs, "from others' parts, float32": as_they_come}
            if compiler():
                steps["from others' parts, compiled"] = lambda: theirs(fast)
        with FlopCounterMode(display=False) as counter:
            ours()
        title = f"training step, {size}, batch {batch}, {fresh} fresh tracks"
        medians = race(title, steps | products, repeats=5)  # rates of the same minutes
        flop = counter.get_total_flops()
        print("  " + ", ".join(f"{p} {2 * n ** 3 / medians[p] / 1e9:,.0f} GFLOP/s" for p in products))
        for name in list(steps)[:2 if compiler() else 1]:
            rate = flop / medians[name]
            print(f"  {name}: {batch / medians[name]:,.0f} tracks/s; {flop / 1e9:,.1f} GFLOP a step, "
                  f"{rate / 1e9:,.0f} GFLOP/s, {rate * medians[used] / 2 / n ** 3:.0%} of the {used}")
        parts = {"the whole step": ours} | parts_of_a_step(net, batch, fresh, waves)
        race(f"of it, {size}", parts, repeats=5)
    print("\ncost of losses and backward, demo width: ms per track")
    for depth in (3, 6, 12):
        net, costs = MT2(Config(depth=depth)).to(device).train(), []
        for batch in (32, 128, 512):
            step = training_step(net, torch.nn.Identity(), noise(1).to(device), music(batch))
            costs.append(f"batch {batch} {1000 * clock(step) / batch:6.2f}")
        print(f"  depth {depth:2}: " + ", ".join(costs), flush=True)


def benchmark_probe(device):
    """65 probes (13 layers x 5 readouts, 800 clips of width 192, 24 classes) at once, and one by one."""
    classes, y = torch.arange(1200, device=device) % 24, torch.eye(24, device=device)
    x = noise(65, 1200, 192).to(device) + 0.2 * noise(24, 192, seed=1).to(device)[classes]  # in part readable
    x, held_x, y, held = x[:, :800], x[0, 800:], y[classes[:800]], classes[800:]
    right = lambda logits: (logits.argmax(1) == held).float().mean().item()

    def recipe():  # of the papers: 50 epochs x 128 steps of AdamW, batch 128, for each probe
        layer = torch.nn.Linear(192, 24).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        for step in range(6400):
            rows = torch.randint(800, (128,), device=device)
            optimizer.zero_grad()
            F.cross_entropy(layer(x[0, rows]), y[rows]).backward()
            optimizer.step()
        return right(layer(held_x))
    fit = lambda part: probe.fit(part, y, False, l2=(0.01,))
    one_by_one = lambda: [fit(x[g:g + 1]) for g in range(65)]
    seconds = race("65 linear probes", {"at once": lambda: fit(x), "1 of 65 by the papers' recipe": recipe,
                                        "the same solver, one by one": one_by_one}, repeats=2)
    at_once, one, alone = seconds.values()
    w = fit(x)[0, 0]
    print(f"  all 65 by the papers' recipe: {65 * one:.0f} s, {65 * one / at_once:.0f} times as long; "
          f"held-out accuracy {right(held_x @ w[:-1] + w[-1]):.3f}, by the recipe {recipe():.3f}")
    model, clips = MT2(Config(size="paper")).to(device).eval(), noise(40, 64000).to(device)
    with torch.no_grad():
        one_pass = race("features of 40 clips, paper size", {"layers": lambda: model.layers(clips)}, 3)
    features = 20 * one_pass["layers"]  # of 800 clips
    together, apart = features + at_once, 65 * features + alone  # s
    print(f"  from the sound on: {together:.1f} s for one probe or for 65 at once; in 65 commands, each with "
          f"its own pass, {apart:.0f} s, {apart / together:.0f} times as long")


def benchmark():
    device = mt2.pick_device("auto")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; x: times the first")
    benchmark_vqt(device)
    benchmark_losses(device)
    benchmark_memory()
    mt2.keep_memory()
    print("\nfrom here on freed memory is kept, as in training; the peers have the good of it as well")
    benchmark_vqt(device)
    benchmark_step(device)
    benchmark_probe(device)


if __name__ == "__main__":
    benchmark()
