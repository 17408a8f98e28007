"""MT2 in one file: two class tokens, two losses, no labels (Kong et al., WASPAA 2025, arXiv 2507.12996).

A Vision Transformer reads music as one patch per spectrogram frame. Two class tokens travel with the frames:
`eq` learns what key the music is in (CPSD: transposing the input must rotate the output), `con` learns what
the music sounds like (NT-Xent: two segments of one track must agree). Nobody ever tells it a key.

The demo takes about six minutes on two CPU cores; it then names the right key signature for .96 of 138
held-out real pieces, and for nearly all others one a fifth away (`python probe.py key`; mean of eight seeds,
torch 2.11, November 2026).

    python mt2.py                             # train the demo on generated music, then say what was learned
    python mt2.py --data my_music/            # the same for two fifths of the run, then mixed with your music
    torchrun --nproc-per-node 8 mt2.py ...    # the same on many GPUs

The file reads as sound flows, from wave to command line. "Ours" marks choices that the papers leave open;
"measured" says what one was worth, "prototype" the same in runs before this file, "exact" is the share of key
signatures named right (more in README.md). A track is a piece; A and B are two segments of it, 4 s each; a
view is what a loss sees of one: some frames, and a crop of the spectrum, whose offset transposes it (A' is A
at another crop). Shapes: B clips (inputs), T samples, F frames, N tokens, D their width, P that of z.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import math
import os
import random
import signal
import sys
import time
import zipfile
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn  # its reductions have gradients
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

def need(good, message):
    """ValueError with a one-line message for the user, unless all is good."""
    if not good:
        raise ValueError(message)

# ---- Config: what a user may want to change; each field is a command-line flag ---------------------------

SAMPLE_RATE, SECONDS, HOP = 16000, 4.0, 512  # the paper's input: 4 s of mono sound at 16 kHz
SAMPLES = int(SAMPLE_RATE * SECONDS)         # 64,000 samples
FRAMES = SAMPLES // HOP + 1                  # 126 frames of 32 ms
N_MELS = 128
# a crop keeps 84 of the 99 VQT bins, seven octaves, from bin `offset` (0..15) on; MIDDLE: where none is given
N_BINS, N_CROP, N_OFFSETS, MIDDLE = 99, 84, 16, 8
SIZES = {  # demo: minutes on two laptop cores, ours; paper: ViT-Tiny, 5.5 M parameters (lr: ours)
    "demo": dict(dim=96, depth=3, lr=2e-3, frames=14),
    "paper": dict(dim=192, depth=12, lr=1e-3, frames=126)}

def knob(default, text, *limits):
    """A Config field: its default, help and limits, which are choices or a number's least (and most)."""
    return dataclasses.field(default=default, metadata={"help": text, "limits": limits})

@dataclasses.dataclass
class Config:
    """What makes a run; AdamW's numbers are in `train`. None: set by `size`. ValueError for bad ones."""
    data: str = knob("", "folder of music; empty: music made on the fly by SyntheticMusic")
    out: str = knob("runs/demo", "run folder: model.pt, state.pt, log.csv, monitor.csv")
    init: str = knob("", "run folder or model.pt whose weights to start from")
    size: str = knob("demo", "demo | paper: sets dim, depth, lr, frames", *SIZES)
    encoder: str = knob("vit", "vit: MT2 | tune: TUNe and CLMR, waveform, contrastive only", "vit", "tune")
    expansion: int = knob(4, "of TUNe: expansion layers, 1 to 4; 0 is CLMR's SampleCNN", 0, 4)
    tasks: tuple = knob("eq,con", "class tokens, in token order: eq,con | eq | con", "eq,con", "eq", "con")
    inputs: tuple = knob("mel,vqt", "added branches: mel,vqt | mel | vqt", "mel,vqt", "mel", "vqt", "wave")
    steps: int = knob(2400, "optimiser steps (paper: about 1000 epochs of 512 steps)", 1)
    batch: int = knob(128, "tracks per step and process (paper: 128)", 2)
    seed: int = knob(0, "of weights, music and views", 0, 2 ** 17)
    device: str = knob("auto", "auto | cpu | cuda")
    dim: int = knob(None, "width of a token (paper: 192); None: by --size", 1, 1e5)
    depth: int = knob(None, "transformer blocks (paper: 12); None: by --size", 1, 1e3)
    heads: int = knob(3, "attention heads (paper: 3)", 1, 1e3)
    proj_dim: int = knob(64, "width of the contrastive embedding z; ours", 1, 1e5)
    frames: int = knob(None, "frames of an equivariant view; None: by --size; ours", 1, FRAMES)
    con_frames: int = knob(3, "frames of a contrastive view; ours", 1, FRAMES)
    eq_db: float = knob(4.0, "random equaliser of equivariant views: std in dB, 1.4 x at ends; ours", 0, 40)
    hide_mel: int = knob(1, "1: equivariant views see no mel, which would leak absolute pitch; ours", 0, 1)
    temperature: float = knob(0.1, "of NT-Xent (paper: 0.1)", 0.01, 1e3)
    eq_weight: float = knob(10.0, "weight of CPSD beside NT-Xent; ours", 0, 1e6)
    lr: float = knob(None, "peak learning rate; None: by --size; ours", 0, 1e3)
    warmup: int = knob(50, "steps of linear warm-up; ours", 1)
    fresh: int = knob(12, "new tracks per step into the pool, from which batches are drawn; ours", 1)
    pool: int = knob(2048, "tracks that the pool remembers; ours", 1)
    easy: float = knob(0.2, "share of the run with easy music; as long a ramp; then --data; ours", 0, 0.5)
    generated: float = knob(0.5, "share of generated music that stays beside --data; ours", 0, 0.9)
    gap: float = knob(30.0, "seconds between the starts of segments A and B of a file, at most; ours", 0)
    workers: int = knob(-1, "processes for music; -1: half of the cores, with a GPU up to 12", -1, 1e3)
    save_every: int = knob(250, "steps between saves", 1)
    compile: int = knob(0, "1: torch.compile the encoder: a minute or two first, for faster steps", 0, 1)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind, limits, given = field.type, field.metadata["limits"], getattr(self, field.name)
            if given is None:  # `size` is checked before the fields that it sets
                given = SIZES.get(str(self.size), {}).get(field.name)
            given = ",".join(map(str, given)) if isinstance(given, (tuple, list)) else given  # as typed
            flag = f"--{field.name.replace('_', '-')} {given}"
            if kind in (int, float):
                try:
                    value = kind(given)
                except (TypeError, ValueError, OverflowError):
                    value = math.nan  # which equals nothing
                least, most = (*limits, 1e9)[:2]  # 1e9 where only the least is given
                need(value == given, f"{flag}: must be {kind.__name__}")
                need(least <= value <= most, f"{flag}: must lie between {least:g} and {most:g}")
            else:
                need(given is not None, f"{flag}: must be {kind.__name__}")
                need(not limits or given in limits, f"{flag}: choose {' | '.join(limits)}")
                value = tuple(given.split(",")) if kind is tuple else str(given)
            setattr(self, field.name, value)  # plain: weights_only loads no Path, no number of numpy
        if self.encoder == "tune":
            need("con" in self.tasks, "--tasks eq: waveform encoders learn con alone; use --encoder vit")
            self.tasks, self.inputs = ("con",), ("wave",)
        elif "vqt" not in self.inputs and ("eq" in self.tasks or "mel" not in self.inputs):
            raise ValueError(f"--inputs {self.inputs[0]}: eq needs vqt, con needs mel or vqt")
        elif self.tasks == ("eq",) and self.hide_mel:
            self.inputs = ("vqt",)  # no view would see mel
        both = f"--batch {self.batch} and --fresh {self.fresh}"
        need(self.pool >= max(self.batch, self.fresh), f"--pool {self.pool}: must hold {both}")
        need(self.dim % self.heads == 0, f"--dim {self.dim} cannot be divided among --heads {self.heads}")

# ---- Many processes: without torchrun there is one, and nothing is sent ----------------------------------

def world_size():
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1

def all_sum(x):
    """Sum over all processes; backward sums their gradients."""
    return x if world_size() == 1 else dist_nn.all_reduce(x)

def gather(x):
    """[n, ...] of each process -> [world_size n, ...]."""
    return x if world_size() == 1 else torch.cat(dist_nn.all_gather(x))

def average(tensors):
    """Average each tensor over all processes, in place, in one reduction."""
    flat = nn.utils.parameters_to_vector(tensors)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / world_size(), tensors)

# ---- Wave -> spectrogram --------------------------------------------------------------------------------

def unit_range(db):
    """dB [B, F, bins] -> [0, 1]: dB below each clip's own loudest bin, 80 dB floor, dB/80 + 1."""
    loudest = db.amax((1, 2), keepdim=True).clamp_min(-80)  # [B, 1, 1]; or else silence would come out loud
    return ((db - loudest) / 80 + 1).clamp(0, 1)

class VQT(nn.Module):
    """Variable-Q transform as a few matrix products.

    Bin j is centred on f = fmin 2^(j / bins_per_octave) Hz: at each frame, the wave times a complex sinusoid
    in a Hann window of 1 / (alpha f + gamma) s (Schoerkhuber et al., 2014; gamma in Hz widens the bass bins;
    0, a constant Q, is ours). An octave of n = 12 bins (the topmost: the 3 that are left) is one product of
    overlapping windows with a [window, 2n] matrix of cosines and sines. On the way down, whenever an octave
    allows it, the wave goes on at a quarter of its rate (measured: 4.4 times as fast)."""

    def __init__(self, sample_rate=16000, hop=512, fmin=27.5, n_bins=99, bins_per_octave=12, gamma=0.0):
        super().__init__()
        freq = fmin * 2 ** (torch.arange(n_bins, dtype=torch.float64) / bins_per_octave)  # Hz
        if freq[-1] >= sample_rate / 2:
            raise ValueError(f"VQT: the top bin, {freq[-1]:.0f} Hz, must lie below half of {sample_rate} Hz")
        alpha = 2 ** (1 / bins_per_octave) - 1  # bandwidth: from a bin to the next
        length = 1 / (alpha * freq + gamma)  # of each window, in seconds
        # the main lobe, f +- 2 / length, must end below the mirror image, sample_rate - f: only bin 98 grows
        length = length.maximum(1 / (sample_rate / 2 - freq))
        self.hop, rate = hop, sample_rate
        self.hops = []  # of each octave, from the top down
        self.margin = 0  # hops by which the widest window reaches beyond the ends of the wave
        for i in reversed(range(0, n_bins, bins_per_octave)):
            f, span = freq[i:i + bins_per_octave], length[i:i + bins_per_octave]  # of one octave, [n]
            while f[-1] < rate / 16 and hop % 4 == 0:  # the octave stays below a quarter of the new rate
                rate, hop = rate / 4, hop // 4
            half = int(span.max() * rate / 2)  # samples on either side of a frame's centre
            t = torch.arange(-half, half + 1, dtype=torch.float64)[:, None] / rate  # s
            hann = torch.cos(math.pi * t / span) ** 2 * (t.abs() < span / 2)  # [window, n], of own lengths
            hann = 2 * hann / hann.sum(0)  # a sine of amplitude a reads a
            angle = 2 * math.pi * f * t
            kernel = torch.cat([hann * angle.cos(), hann * angle.sin()], dim=1).float()  # [window, 2n]
            self.register_buffer(f"kernel{len(self.hops)}", kernel, persistent=False)  # in no checkpoint
            self.hops.append(hop)
            self.margin = max(self.margin, half // hop + 1)
        quarter = torchaudio.functional.resample(torch.eye(120), 4, 1)[:, 7:-7].contiguous()  # [120, 16]
        self.register_buffer("quarter", quarter, persistent=False)

    def _apply(self, fn, recurse=True):
        """Behind `to` and `half`: kernels stay in float32 at least, as half ones err by .3 of the range."""
        def keep(x):
            y = fn(x)
            return y if y.element_size() >= 4 else x.to(y.device)
        return nn.Module._apply(self, keep, recurse)

    def quarter_rate(self, wave):
        """Wave [B, T] -> the same at a quarter of its rate: torchaudio's resampler as a matrix (measured: the
        VQT takes .55 of the time). A window of 120 samples becomes 30, of which 7 at either end are dropped,
        as it was cut there. The other 16 are 64 samples, 28 to 91: the next window starts 64 later."""
        windows = F.pad(wave, (28, 92)).unfold(-1, 120, 64)  # [B, windows, 120], a view
        return (windows @ self.quarter).flatten(1)

    def magnitude(self, wave):
        """Wave [B, T] -> linear magnitude [B, T // hop + 1, n_bins]; frames centred, zeros beyond."""
        n_frames, octaves = wave.shape[-1] // self.hop + 1, []
        wave = wave.to(self.quarter.dtype)  # files are often read as float64
        wave = F.pad(wave, (self.margin * self.hop, (self.margin + 1) * self.hop))  # once, for all octaves
        wave_hop = self.hop  # a frame's step in samples of `wave`, which shrinks with its rate
        for i, hop in enumerate(self.hops):
            kernel = self.get_buffer(f"kernel{i}")
            start = self.margin * hop - len(kernel) // 2  # of the first frame's window
            with torch.autocast(wave.device.type, enabled=False):  # bf16: 1 bin in 100 is off by 7 dB
                while wave_hop > hop:
                    wave, wave_hop = self.quarter_rate(wave), wave_hop // 4
                windows = wave[:, start:].unfold(-1, len(kernel), hop)[:, :n_frames]  # [B, F, window], a view
                real, imag = (windows @ kernel).chunk(2, dim=-1)  # [B, F, n] each
            power = real.square() + imag.square()
            octaves.insert(0, power.clamp_min(1e-30).sqrt())  # at 0 the root's gradient is infinite
        return torch.cat(octaves, dim=-1)

    def decibels(self, wave):
        """Wave [B, T] -> dB re a full-scale sine [B, F, n_bins], at least -160."""
        return 20 * self.magnitude(wave).clamp_min(1e-8).log10()

    def forward(self, wave):
        """Wave [B, T] -> log-magnitude [B, F, n_bins] in [0, 1]."""
        return unit_range(self.decibels(wave))

class FrontEnd(nn.Module):
    """Both spectrograms of a wave in dB, before all that depends on the view (equaliser, scaling, crop)."""
    _apply = VQT._apply  # in float32 at least

    def __init__(self):
        super().__init__()
        self.vqt = VQT(SAMPLE_RATE, HOP, n_bins=N_BINS)
        self.mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, 1024, hop_length=HOP, n_mels=N_MELS,
                                                        power=None)  # a complex spectrum

    def forward(self, wave):
        """Wave [B, T] -> mel dB [B, F, 128] and VQT dB [B, F, 99]; 0 dB is about a full-scale sine."""
        wave = wave.to(self.vqt.quarter.dtype)
        with torch.autocast(wave.device.type, enabled=False):
            x = self.mel.spectrogram(wave)  # [B, 513, F]; power=2 would take 1.5 times as long (measured)
            power = self.mel.mel_scale(x.real.square() + x.imag.square()).transpose(1, 2)
            power = power / 256 ** 2  # 256: half of the Hann window's sum
            return 10 * power.clamp_min(1e-16).log10(), self.vqt.decibels(wave)

def random_equaliser(n, std_db, generator):
    """Random smooth frequency responses, one per view -> dB for the VQT bins [n, 1, 99] (ours).

    A random level each octave, linear in between, plus a tilt. Every view draws its own: one shared by A, B
    and A' would move with the crop, and y could follow it, not the key (prototype: exact .09, not .90)."""
    knot, octave = torch.arange(9), (torch.arange(N_BINS) / 12).clamp_max(8)  # 9 levels; each bin's octave
    hat = (1 - (octave - knot[:, None]).abs()).clamp_min(0)  # [9, 99]: a triangle around each knot
    tilt = 0.25 * (knot - 4)  # from -1 at the lowest knot to 1 at the highest
    curve = torch.randn(n, 9, generator=generator) + torch.randn(n, 1, generator=generator) * tilt
    return std_db * (curve @ hat)[:, None]

def crop(vqt, offset):
    """VQT [B, F, 99], offset [B] in 0..15 -> [B, F, 84]. One more offset looks one semitone lower."""
    bins = offset[:, None] + torch.arange(N_CROP, device=vqt.device)  # [B, 84]
    return vqt.gather(2, bins[:, None].expand(-1, vqt.shape[1], -1))

# ---- Spectrogram -> patches -> transformer -> class tokens ----------------------------------------------

class Block(nn.Module):
    """Pre-norm transformer block (ViT) [B, N, D] -> [B, N, D]: x + attention(norm(x)), x + mlp(norm(x))."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def project(self, x):
        """-> queries, keys, values, each [B, heads, N, D / heads]. A method for probe.py, as is the next."""
        q_k_v = self.qkv(self.norm1(x)).chunk(3, dim=-1)  # [B, N, D] each
        return [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in q_k_v]

    def attention(self, q, k):
        """Softmax weights [B, heads, N, N]."""
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    def forward(self, x, first=None):
        """first: how many leading tokens to return, None: all; they still attend to all."""
        q, k, v = self.project(x)
        q, x = q[:, :, :first], x[:, :first]
        if x.is_cuda:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:  # fused, a step on CPU takes 1.5 to 2 times as long in bf16, .97 in float32 (measured)
            mixed = self.attention(q, k) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))  # heads side by side again
        return x + self.mlp(self.norm2(x))

class Output(NamedTuple):
    """What MT2 says of a batch; y or z is None where the model lacks the task."""
    y: torch.Tensor       # [B, 12] probabilities of pitch classes, from the equivariant token
    z: torch.Tensor       # [B, P] contrastive embedding
    tokens: torch.Tensor  # [B, n_cls + F, D] last layer, class tokens first

class MT2(nn.Module):
    """One ViT over spectrogram frames, with a class token per task.

    token_t = patch(mel_t) + patch(vqt_t) + position_t. A class token is a learned vector plus the time-mean
    of its own branch's patches (eq: VQT, con: mel), plus its position."""

    def __init__(self, config):
        super().__init__()
        self.config, self.class_tokens, dim = config, config.tasks, config.dim
        self.hides_mel = bool(config.hide_mel) and "eq" in config.tasks and "mel" in config.inputs
        self.front_end = FrontEnd()
        patch = lambda bins: nn.Sequential(nn.LayerNorm(bins), nn.Linear(bins, dim), nn.GELU())
        if "mel" in config.inputs:
            self.patch_mel = patch(N_MELS)
        if "vqt" in config.inputs:
            self.patch_vqt = patch(N_CROP)
        self.cls = nn.Parameter(0.02 * torch.randn(len(config.tasks), dim))  # the learned part
        self.position = nn.Parameter(0.02 * torch.randn(len(config.tasks) + FRAMES, dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        if "con" in config.tasks:
            layers = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, config.proj_dim)
            self.head_con = nn.Sequential(*layers)
        if "eq" in config.tasks:
            self.head_eq = nn.Linear(dim, N_CROP)
            # running mean of the logits at each crop offset, for `center` outside of training
            self.register_buffer("offset_mean", torch.zeros(N_OFFSETS, 12))
        for module in self.modules():
            if isinstance(module, nn.Linear):  # LeCun's start: variance stays (ours)
                nn.init.trunc_normal_(module.weight, std=module.in_features ** -0.5)
                nn.init.zeros_(module.bias)
        if "eq" in config.tasks:
            self.start_as_folded_spectrum()

    @torch.no_grad()
    def start_as_folded_spectrum(self):
        """At first y is close to the spectrum folded into one octave: a VQT patch that lets each bin through,
        undone by the equivariant head, and small residual branches (as in GPT-2). Ours: beside the
        contrastive loss the usual start does not get going (prototype: exact key .08 instead of .92)."""
        weight = self.patch_vqt[1].weight  # [D, 84]
        start = nn.init.eye_ if len(weight) >= N_CROP else nn.init.orthogonal_
        start(weight).mul_(1.5)
        self.head_eq.weight.copy_(1.5 * weight.T)
        for block in self.blocks:
            block.out.weight.mul_(0.2)
            block.mlp[2].weight.mul_(0.2)

    def encode(self, mel, vqt, frames=None, cls_only=False):
        """Features in [0, 1], mel [B, F, 128] and vqt [B, F, 84] -> depth + 1 layers, each [B, n_cls + F, D].

        Layer 0 is the input of the blocks; the final norm is on the last. mel None: hidden, its patches 0.
        frames [F] are the frames' places among the 126. cls_only: the last layer is [B, n_cls, D]; losses
        read no more of it (measured: a demo step takes .63 to .80 of the time)."""
        n_cls, branch = len(self.class_tokens), {}  # each branch [B, F, D]
        if "vqt" in self.config.inputs:
            branch["vqt"] = self.patch_vqt(vqt)
        if "mel" in self.config.inputs:
            branch["mel"] = torch.zeros_like(branch["vqt"]) if mel is None else self.patch_mel(mel)
        own = {"eq": branch.get("vqt"), "con": branch.get("mel", branch.get("vqt"))}  # con without mel: VQT
        cls = self.cls + torch.stack([own[task].mean(1) for task in self.class_tokens], dim=1)
        x = torch.cat([cls, sum(branch.values())], dim=1)  # [B, n_cls + F, D]
        places = slice(0, x.shape[1] - n_cls) if frames is None else frames
        x = x + torch.cat([self.position[:n_cls], self.position[n_cls:][places]])
        layers = [x]
        *blocks, last = self.blocks
        for block in blocks:
            layers.append(block(layers[-1]))
        return [*layers, self.norm(last(layers[-1], first=n_cls if cls_only else None))]

    def logits(self, token):
        """Equivariant token [B, D] -> [B, 12]: 84 bins, averaged over seven octaves."""
        bins = self.head_eq(token).view(-1, 7, 12)
        return bins.mean(1, dtype=torch.promote_types(bins.dtype, torch.float32))  # not in bf16

    def center(self, logits, offset, training=False):
        """(logits [B, 12] - mean of all clips at the same offset) / (2 x their own root mean square); ours.

        training: the mean is this batch's, and the running mean follows it; else it is the running mean, so
        that no clip depends on another.
        Why a mean per offset: over many songs no key is preferred at any crop. Without it CPSD is solved by
        reading the offset off the spectral envelope: the shortcut, and no key is learned (prototype: exact
        .08 instead of .90). Why 2: a soft y can point between two pitch classes, where a sharp one snaps to
        either (measured: real windows .71 exact instead of .64). Why their own: divided by the batch's, long
        runs give up hard clips to be surer of easy ones (measured: .88 exact instead of .98)."""
        mean = self.offset_mean
        if training:
            one_hot = F.one_hot(offset, N_OFFSETS).to(logits.dtype)  # [B, 16]
            total, count = all_sum(one_hot.T @ logits), all_sum(one_hot.sum(0))[:, None]
            mean = total / count.clamp_min(1)  # [16, 12]
            with torch.no_grad():
                self.offset_mean.lerp_(mean, 0.1 * (count > 0))
        logits = logits - mean[offset]
        return logits / (2 * (logits.square().mean(1, keepdim=True) + 1e-5).sqrt())

    def features(self, wave):
        """Wave [B, T] of any floating-point kind -> mel [B, F, 128], VQT [B, F, 99], both in [0, 1]."""
        sound = torch.is_tensor(wave) and wave.is_floating_point()
        need(sound, "MT2 takes waves as a tensor of floating-point numbers, in [-1, 1]")
        fits = wave.ndim == 2 and len(wave) and HOP < wave.shape[1] <= SAMPLES
        need(fits, f"MT2 takes waves [B, {HOP + 1} to {SAMPLES} samples], not {list(wave.shape)}")
        return [unit_range(x).to(self.cls.dtype) for x in self.front_end(wave)]

    def crop_offsets(self, wave, offset):
        """An int, [B] or None (the middle) -> the crop's offset for each wave [B]. ValueError if outside."""
        offset = torch.as_tensor(MIDDLE if offset is None else offset, device=wave.device)
        whole = not offset.is_floating_point() and offset.shape in ((), wave.shape[:1])
        need(whole, f"MT2: offset must be a whole number, or one for each of {len(wave)} waves")
        inside = ((0 <= offset) & (offset < N_OFFSETS)).all()
        need(inside, f"MT2: an offset must lie between 0 and {N_OFFSETS - 1}")
        return offset.long().expand(len(wave))

    def passes(self, wave, offset=None):
        """Wave [B, T] -> [passes, depth + 1, B, n_cls + F, D]: two passes, without mel and then with it, if
        training hides mel from the equivariant token; else one with all branches."""
        mel, vqt = self.features(wave)
        vqt = crop(vqt, self.crop_offsets(wave, offset))
        mels = [None, mel] if self.hides_mel else [mel]
        return torch.stack([torch.stack(self.encode(mel, vqt)) for mel in mels])

    def layers(self, wave, offset=None):
        """Wave [B, T] -> [depth + 1, B, n_cls + F, D]; offset of the crop: int or [B], None for the middle.

        The equivariant token comes from the first pass, the contrastive one from the last; sequence tokens
        are the mean of all (ours; measured: a chord probe reads .77 from it, .67 from the pass with mel)."""
        x, n = self.passes(wave, offset), len(self.class_tokens)
        # token 0 is eq, or con in a model without eq, which has one pass
        return torch.cat([x[0, :, :, :1], x[-1, :, :, 1:n], x.mean(0)[:, :, n:]], dim=2)

    def pitch(self, wave, offsets=(MIDDLE,)):
        """y alone at several crops, with one front end for all: wave [B, T] -> [len(offsets), B, 12]."""
        mel, vqt = self.features(wave)
        mel = None if self.hides_mel else mel
        y = []
        for offset in offsets:
            offset = self.crop_offsets(wave, offset)  # [B]
            token = self.encode(mel, crop(vqt, offset), cls_only=True)[-1][:, 0]
            y.append(self.center(self.logits(token), offset).softmax(-1))
        return torch.stack(y)

    def forward(self, wave, offset=None):
        """Wave [B, T] -> Output(y, z, tokens); offset of the crop 0..15: int or [B], None: the middle."""
        tokens = self.layers(wave, offset)[-1]
        cls = dict(zip(self.class_tokens, tokens.unbind(1)))  # {name: [B, D]}
        offset = self.crop_offsets(wave, offset)
        y = self.center(self.logits(cls["eq"]), offset).softmax(-1) if "eq" in cls else None
        z = self.head_con(cls["con"]) if "con" in cls else None
        return Output(y, z, tokens)

class TUNe(nn.Module):
    """Tailed U-Net on the waveform (Vélez Vásquez & Burgoyne, ISMIR 2022); expansion 0: CLMR's SampleCNN.

    TUNe+: contraction by convolution and max-pooling by 3, expansion by transposed convolutions joined with
    the contraction, a tail down to three frames of 512 joined with the expansion: 2.2 M parameters
    (SampleCNN: 2.4 M) beside head_con, as published. There the input is 59,049 = 3^10 samples at 22,050 Hz,
    so that all pooling divides; here the middle 59,049 of the 64,000 that every system hears (ours)."""
    LENGTH, WIDTHS = 3 ** 10, (11, 22, 44, 88, 176)
    class_tokens = ()

    def __init__(self, config):
        super().__init__()
        self.config, up, w = config, config.expansion, self.WIDTHS

        def conv(i, o, stride=1, padding=1):
            return nn.Sequential(nn.Conv1d(i, o, 3, stride, padding), nn.BatchNorm1d(o), nn.ReLU())
        if up:
            self.down = nn.ModuleList(conv(i, o) for i, o in zip((1,) + w, w))  # 59,049 to 729 frames
            # each expansion layer: three times the frames, joined with the contraction's of that length
            self.grow = nn.ModuleList(nn.ConvTranspose1d(w[i + 1], w[i], 3, 3) for i in range(3, 3 - up, -1))
            self.join = nn.ModuleList(conv(2 * w[i], w[i]) for i in range(3, 3 - up, -1))
            tail = [(w[i - 1] + w[i], w[i]) for i in range(5 - up, 5)]  # pooled and joined
            tail += [(176, 352), (352, 352), (352, 352), (352, 352), (352, 512)]  # alone, to three frames
            self.tail = nn.ModuleList(conv(i, o) for i, o in tail)
        else:
            w = (128, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512)  # 59,049 to one frame
            self.down = nn.ModuleList([conv(1, 128, 3, 0), *(conv(i, o) for i, o in zip(w, w[1:]))])
            self.grow = self.join = self.tail = ()
        self.head_con = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, config.proj_dim))

    def layers(self, wave):
        """Wave [B, T] -> every stage, a list of [B, frames_l, dim_l]. Shorter waves are padded with zeros."""
        if not (wave.is_floating_point() and wave.ndim == 2 and len(wave) and 0 < wave.shape[1] <= 64000):
            kind = f"{list(wave.shape)}, {wave.dtype}"
            raise ValueError(f"TUNe takes waves [B, 1 to 64000 samples] in floating point, not {kind}")
        wave = wave.to(self.head_con[0].weight.dtype)
        wave = F.pad(wave, (0, max(0, self.LENGTH - wave.shape[1])))
        start = (wave.shape[1] - self.LENGTH) // 2
        x = wave[:, None, start:start + self.LENGTH]  # [B, 1, 59,049]
        stages, up = [], self.config.expansion
        for i, conv in enumerate(self.down):
            if up:  # TUNe pools before every convolution but the first
                x = conv(F.max_pool1d(x, 3) if i else x)
            else:  # SampleCNN pools after every one but the first and the last
                x = conv(x) if i in (0, 10) else F.max_pool1d(conv(x), 3)
            stages.append(x)
        for i, (grow, join) in enumerate(zip(self.grow, self.join)):
            x = join(torch.cat([grow(x), stages[3 - i]], dim=1))  # the contraction's stage of that length
            stages.append(x)
        for i, conv in enumerate(self.tail):
            x = F.max_pool1d(x, 3)
            x = conv(torch.cat([x, stages[3 + up - i]], dim=1) if i < up else x)  # the expansion's
            stages.append(x)
        return [stage.transpose(1, 2) for stage in stages]

    def forward(self, wave):
        """Wave [B, T] -> z [B, P]: the last stage, averaged over time and projected."""
        return self.head_con(self.layers(wave)[-1].mean(1))

    encode = forward  # what `losses` asks a model for

def build(config):
    """The encoder that a config describes, with fresh weights."""
    return TUNe(config) if config.encoder == "tune" else MT2(config)

# ---- Losses ---------------------------------------------------------------------------------------------

class NTXent(torch.autograd.Function):
    """NT-Xent of rows x [n, P], the first half a, the second b, with its gradient in closed form.

    With z the unit rows, S the softmax of row i over j != i, Y 1 at positive pairs and 0 elsewhere, dL/dz =
    ((S - Y) + (S - Y)^T) z / (n t). Forward keeps each row's sum of exp; backward computes the similarities
    again, a strip of `block` rows at a time: memory grows with n x block. In one process rows and columns
    are the same: strips begin at the diagonal. Among processes each takes its own n rows and everybody's N
    columns: two gathers forward, none backward."""
    KEEP = 2 ** 22  # a matrix of up to 16 MB is kept after all: up to 1.4 times as fast, measured

    @staticmethod
    def forward(ctx, x, temperature, block):
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # [n, 1]
        scale = torch.where(norm <= 1e-12, 0, 1 / norm)  # 0-rows stay 0 and get no gradient; NaN stays NaN
        z = x * scale
        n, columns = len(z), gather(z)  # [N, P], the z of all processes
        sums = z.new_zeros(n)
        ctx.temperature, ctx.block, ctx.kept = temperature, block, None
        strips = NTXent.strips(z, columns, temperature, block)
        if n * len(columns) <= NTXent.KEEP:
            strips = ctx.kept = list(strips)
        for i, first, e in strips:
            sums[i:i + block] += e.sum(1)
            if len(columns) == n:  # the strip, mirrored, holds the columns of later rows
                sums[i + block:] += e[:, block:].sum(0)
        all_sums = gather(sums)  # [N], of all processes' rows
        ctx.save_for_backward(z, scale, columns, sums, all_sums)
        a, b = columns.view(-1, 2, n // 2, z.shape[1]).unbind(1)  # each sent a, then b: [processes, n / 2, P]
        return all_sums.log().mean() + (1 - (a * b).sum(-1).mean()) / temperature

    @staticmethod
    def strips(z, columns, t, block):
        """Yields i, the first column and exp((s - 1) / t) of rows i to i + block: all columns, or in one
        process those from i on. Cosines s are at most 1: exp never overflows, no row maximum is needed."""
        alone = len(columns) == len(z)
        for i in range(0, len(z), block):
            first, own = (i, 0) if alone else (0, i + dist.get_rank() * len(z))  # own: the column of row i
            e = torch.addmm(z.new_full((), -1 / t), z[i:i + block], columns[first:].T, alpha=1 / t).exp_()
            e.diagonal(own).zero_()  # no clip is its own negative
            yield i, first, e

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # else a second derivative would silently be 0
            raise RuntimeError("nt_xent has a first derivative only: no create_graph")
        z, scale, columns, sums, all_sums = ctx.saved_tensors
        n, block, inverse, all_inverse = len(z), ctx.block, 1 / sums, 1 / all_sums
        dz = -2 * z.roll(n // 2, 0)  # -(Y + Y^T) z
        for i, first, e in ctx.kept or NTXent.strips(z, columns, ctx.temperature, block):
            g = (inverse[i:i + block, None] + all_inverse[first:]).mul_(e)  # S + S^T, as e is symmetric
            dz[i:i + block].addmm_(g, columns[first:])
            if len(columns) == n:
                dz[i + block:].addmm_(g[:, block:].T, z[i:i + block])
        dz -= z * (z * dz).sum(1, keepdim=True)  # through z = x / |x|: nothing along z is left
        # by n, not N, the rows of all processes: the loop averages their gradients
        return dz.mul_(scale * (grad / (n * ctx.temperature))), None, None

def nt_xent(a, b, temperature=0.1):
    """NT-Xent (SimCLR): a, b [B, P] of any scale, row i of both from one track -> scalar.

    l(i) = -log exp(sim(i, p(i)) / t) / sum_{j != i} exp(sim(i, j) / t), mean over the 2B rows of all
    processes, with gradients exact once they are averaged; log(2B - 1) for identical embeddings. Rows shorter
    than 1e-12, or so long that their square overflows, count as orthogonal to all. ValueError for a and b of
    unlike shapes, and for a temperature below 0.01 or that wants a gradient. Inside of torch.compile it runs
    uncompiled, which fullgraph=True forbids."""
    if a.ndim != 2 or a.shape != b.shape or not len(a):
        raise ValueError(f"nt_xent: a {list(a.shape)} and b {list(b.shape)} must both be [B, P]")
    if not temperature >= 0.01 or getattr(temperature, "requires_grad", False):
        raise ValueError(f"nt_xent: temperature {temperature} must be a plain number, at least 0.01")
    with torch.autocast(a.device.type, enabled=False):  # exp(s / t) would magnify bf16's error tenfold
        dtype = torch.promote_types(a.dtype, torch.float32)  # of the result
        z = torch.cat([a, b]).to(torch.float64 if temperature < 0.025 else dtype)  # exp(-2 / t) underflows
        # strips of 2 MB (B to 4096) stay in a CPU's cache; a GPU launches each: few, of 128 MB (unmeasured)
        block = max(64, 2 ** (25 if z.is_cuda else 19) // len(z))
        # compiled, its strips would fail when the batch size changes
        loss = torch.compiler.disable(NTXent.apply) if torch.compiler.is_compiling() else NTXent.apply
        return loss(z, temperature, block).to(dtype)

def dft(y, omega=7):
    """DFT of y [..., 12] at one frequency -> real and imaginary part, [...] each.

    omega 7: circle of fifths, 1: semitones. Sums, as compiled they fuse; a matrix product would not."""
    angle = 2 * math.pi * omega / 12 * torch.arange(12, device=y.device, dtype=y.dtype)
    return (y * angle.cos()).sum(-1), -(y * angle.sin()).sum(-1)

def cpsd(y_a, y_b, k, omega=7):
    """Cross-power spectral density: mean of D_k = |exp(2 pi i omega k / 12) - yhat_a conj(yhat_b)|^2.

    y_a, y_b [B, 12] probabilities; k int or [B]: b looks k semitones higher than a. 0 if b is a rolled by k
    and both are one-hot, 1 if one is uniform. In real arithmetic, so that it compiles, at least float32."""
    k = torch.as_tensor(k, device=y_a.device)
    if y_a.shape != y_b.shape or k.shape not in ((), y_a.shape[:1]):  # [B, 1] would compare all with all
        shapes = [list(x.shape) for x in (y_a, y_b, k)]
        raise ValueError(f"cpsd: y_a, y_b, k {shapes} must be [B, 12], [B, 12] and one number or [B]")
    y_a, y_b = (y.float() if y.element_size() < 4 else y for y in (y_a, y_b))
    (a_re, a_im), (b_re, b_im) = dft(y_a, omega), dft(y_b, omega)  # [B] each
    angle = 2 * math.pi * omega / 12 * k.to(y_a.dtype)
    re, im = a_re * b_re + a_im * b_im, a_im * b_re - a_re * b_im  # yhat_a conj(yhat_b)
    return ((angle.cos() - re).square() + (angle.sin() - im).square()).mean()

# ---- Data: generated music (ours throughout) ------------------------------------------------------------

INSTRUMENTS = {
    # harmonics fall as h^-slope, even ones times `even`, around a formant in Hz (0: none); attack s, decay s,
    # upper harmonics' decay s (0: the same), depth of vibrato, stretch x: partial h at h sqrt(1 + x h^2)
    #         slope  even formant attack decay upper vibrato stretch
    "piano":    (1.6, 1.00,    0, 0.003, 1.0, 0.3, 0.000, 6e-4),
    "guitar":   (1.3, 1.00,  400, 0.002, 0.5, 0.2, 0.000, 1e-4),
    "strings":  (1.1, 1.00, 1500, 0.080, 9.0, 0.0, 0.004, 0),
    "flute":    (2.4, 1.00,    0, 0.050, 9.0, 0.0, 0.003, 0),
    "clarinet": (1.1, 0.08, 1200, 0.030, 9.0, 0.0, 0.000, 0),
    "brass":    (0.8, 1.00,  900, 0.040, 9.0, 1.5, 0.002, 0),
    "organ":    (0.9, 1.80,    0, 0.012, 9.0, 0.0, 0.000, 0),
    "bells":    (1.8, 0.50,    0, 0.002, 1.5, 0.3, 0.000, 9e-3),
    "voice":    (1.2, 1.00,  650, 0.070, 9.0, 0.0, 0.006, 0),
    "synth":    (0.8, 1.00,    0, 0.008, 9.0, 2.5, 0.000, 0)}
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))  # major, natural minor
# Chance in % of the next degree (columns I to VII) after each degree (rows), in major and in minor. Without
# diminished triads, so that every chord is a major or a minor one.
HARMONY = (((10, 15, 8, 25, 27, 15, 0), (10, 5, 5, 15, 55, 10, 0), (10, 10, 2, 35, 8, 35, 0),
            (30, 12, 3, 5, 40, 10, 0), (55, 3, 4, 10, 5, 23, 0), (10, 25, 10, 30, 20, 5, 0),
            (100, 0, 0, 0, 0, 0, 0)),
           ((10, 0, 10, 25, 20, 20, 15), (100, 0, 0, 0, 0, 0, 0), (20, 0, 5, 15, 10, 30, 20),
            (35, 0, 5, 5, 30, 10, 15), (60, 0, 5, 10, 5, 15, 5), (15, 0, 20, 10, 20, 5, 30),
            (50, 0, 25, 5, 5, 10, 5)))
# Rich music, chances at each degree. LEADING: that minor's seventh is raised. DOMINANT (major, minor): if
# it is not, that the chord's own third is raised, which turns a minor chord into a dominant
LEADING = (0.25, 0, 0, 0.25, 0.95, 0, 0)
DOMINANT = ((0, 0.35, 0.12, 0, 0, 0.15, 0), (0.12, 0, 0, 0.15, 0, 0, 0))
RHYTHMS = ((1, 0, 0, 0), (1, 0, 1, 0), (1, 0, 1, 1), (1, 1, 1, 1), (1, 0, 0, 1), (0, 0, 1, 0))  # of a beat
BEATS, TICKS = 14, 4     # room for a segment's beats (4 s at 180 a minute: 12); a beat has four ticks
CYCLES, TABLE = 8, 8192  # a wavetable holds eight periods, so that partials may lie between harmonics
RELEASE = 640            # samples in which a note dies away: 40 ms

def place(pitch_class, low):
    """The lowest MIDI pitch of a pitch class that is at least `low`."""
    return low + (pitch_class - low) % 12

class SyntheticMusic:
    """Music from (seed, step, n, rich) alone: functional harmony, melody, chords, bass, perhaps drums.

    The two 4 s segments of a track share key, players, tempo and texture, not the notes. Rich tracks add
    minor's raised notes, secondary dominants, chorales, solos, strange timbres, rooms and silence to what
    easy ones have."""

    def __init__(self, seed=0, device="cpu"):
        self.seed, self.device = seed, device
        t = torch.arange(2 * SAMPLES) / SAMPLE_RATE  # s
        noise = torch.randn(16, SAMPLES, generator=torch.Generator().manual_seed(0))
        fall = torch.exp(-6.9 * t[:SAMPLES] / torch.linspace(0.2, 1.6, 16)[:, None])  # 60 dB in 0.2 to 1.6 s
        self.rooms = torch.fft.rfft(F.normalize(noise * fall))  # what 16 rooms add: frequency responses
        self.noise, t = noise.numpy(), t.numpy()
        self.motion = {}  # of an instrument: its phase in seconds, vibrato included, and its envelopes
        for name, (_, _, _, attack, decay, upper, vibrato, _) in INSTRUMENTS.items():
            body = np.minimum(t / attack, 1) * np.exp(-t / decay)
            phase = t + vibrato / 35 * np.sin(35 * t)  # 5.6 Hz; its slope is the frequency's factor
            self.motion[name] = phase, [body, body * np.exp(-t / upper)] if upper else [body]
        t = t[:SAMPLE_RATE // 4]
        # a sine that falls in pitch; envelopes of noise
        self.kick = 0.8 * np.sin(2 * math.pi * (50 * t - 3 * np.exp(-t / 0.03))) * np.exp(-t / 0.06)
        self.snare, self.hat = 0.35 * np.exp(-t / 0.05), 0.12 * np.exp(-t / 0.015)

    def batch(self, n, step, rich=0.5):
        """-> waves [n, 2, 64000] in [-1, 1] and a dict of labels, each starting with n:

        key 0..23 (tonic, + 12 if minor), key_signature 0..11 (tonic of the relative major), instrument 0..9
        (lead), tempo (BPM); chord [n, 2, 126] of each frame (root, + 12 if minor; 24: solo, silence);
        beats [n, 2, 14] and onsets [n, 2, 56] in seconds, NaN where there is none. `rich` is the share
        of rich tracks."""
        rng = random.Random(int(self.seed) * 1_000_003 + int(step))  # int: they may be numpy's
        tracks = [self.track(rng, rng.random() < rich) for _ in range(n)]
        waves, *local = zip(*(self.segment(rng, t) for t in tracks for _ in range(2)))  # A, then B
        waves = torch.from_numpy(np.stack(waves)).unflatten(0, (n, 2))
        each = lambda f: torch.tensor([f(t) for t in tracks])  # [n]
        for i, t in enumerate(tracks):
            if t.wet:  # a room, circular: what rings on at the end is heard at the start
                spectrum = torch.fft.rfft(waves[i]) * (1 + t.wet * self.rooms[t.room])  # [2, 32001]
                waves[i] = torch.fft.irfft(spectrum, SAMPLES)
        loudest = waves.abs().amax(2, keepdim=True).clamp_min(1e-6)
        waves = waves / loudest * each(lambda t: t.level)[:, None, None]
        labels = dict(key=each(lambda t: t.tonic + 12 * t.minor), tempo=each(lambda t: t.tempo),
                      key_signature=each(lambda t: (t.tonic + 3 * t.minor) % 12),
                      instrument=each(lambda t: list(INSTRUMENTS).index(t.names[0])))
        for name, values in zip(("chord", "beats", "onsets"), local):
            labels[name] = torch.tensor(values).unflatten(0, (n, 2))
        return waves.to(self.device), {name: x.to(self.device) for name, x in labels.items()}

    def track(self, rng, rich):
        """What the segments of a track share."""
        texture = rng.choices(("band", "chorale", "solo"), (0.4, 0.42, 0.18))[0] if rich else "band"
        names = rng.sample(list(INSTRUMENTS), 3)  # of melody, chords, bass
        names = names[:1] * 3 if rich and rng.random() < 0.6 else names  # as a piano or a quartet would
        drums = texture == "band" and rng.random() < (0.4 if rich else 0.85)
        low = rng.randint(53, 68), rng.randint(48, 59), rng.randint(31, 40)  # MIDI: about the lowest of each
        return SimpleNamespace(
            rich=rich, texture=texture, names=names, low=low, tonic=rng.randrange(12), minor=rng.randrange(2),
            tables=[self.wavetables(rng, name, p + 12, 8 if rich else 4) for name, p in zip(names, low)],
            gains=[gain * 10 ** -rng.uniform(0, 0.4) for gain in (1.1, 0.6, 0.9)],
            arpeggio=texture == "band" and rng.random() < 0.35,
            drums=drums * 10 ** -rng.uniform(0.1, 1), detune=rng.uniform(-0.25, 0.25),  # semitones
            tempo=60 * 3 ** rng.random(), per_chord=rng.choice((1, 2, 2, 4)) if rich else 2,  # beats
            density=rng.uniform(0.7, 1), offbeat=rng.random(), legato=rng.uniform(0.6, 1),
            dynamics=rng.random() * rich, hiss=10 ** -rng.uniform(2.5, 4), level=10 ** -rng.uniform(0, 0.6),
            wet=10 ** -rng.uniform(0.05, 0.7) * (rich and rng.random() < 0.6), room=rng.randrange(16),
            silent=rng.uniform(0, 1.5) * (rich and rng.random() < 0.1))  # s, at the start

    def wavetables(self, rng, name, pitch, jitter):
        """An instrument around a MIDI pitch -> tables [1 or 2, 8192]: all harmonics, or low and upper ones.

        jitter: dB by which each harmonic may stray, so that no two pianos are alike."""
        slope, even, formant, _, _, upper, _, stretch = INSTRUMENTS[name]
        h = np.arange(1, 25)  # harmonics
        hz = h * 440 * 2 ** ((pitch - 69) / 12)  # none above 5500: of 100 melodies 3 alias beyond -20 dB
        stray = np.array([rng.gauss(0, jitter) for _ in h])
        amp = h ** -slope * np.where(h % 2 == 0, even, 1) * 10 ** (stray / 20) * (hz < 5500)
        amp = amp * (0.15 + np.exp(-np.log2(hz / formant) ** 2)) if formant else amp
        partial = np.round(CYCLES * h * np.sqrt(1 + stretch * h * h)).astype(int)  # stiff strings stretch
        turn = np.exp(2j * math.pi * np.array([rng.random() for _ in h]))  # random phases: no high peaks
        spectrum = np.zeros((2 if upper else 1, TABLE // 2 + 1), complex)
        spectrum[:, partial] = turn * amp / np.linalg.norm(amp) * ([1 / h, 1 - 1 / h] if upper else 1)
        return np.fft.irfft(spectrum, norm="forward").astype(np.float32)

    def harmony(self, rng, t, beats):
        """A walk over degrees -> for each beat: whether a chord begins, its degree, scale [7], triad [3]."""
        degree, into, chords = 0, rng.randrange(t.per_chord), []  # into: beats since a chord began
        for beat in range(beats):
            new = beat == 0 or (beat + into) % t.per_chord == 0  # a segment may begin within a chord
            if new:
                degree, = rng.choices(range(7), HARMONY[t.minor][degree])
                scale = [t.tonic + note for note in SCALES[t.minor]]
                if t.rich and t.minor and rng.random() < LEADING[degree]:  # harmonic or melodic minor
                    scale[6] += 1
                    scale[5] += rng.random() < 0.4
                elif t.rich and rng.random() < DOMINANT[t.minor][degree]:
                    scale[(degree + 2) % 7] += 1
                triad = [scale[(degree + i) % 7] % 12 for i in (0, 2, 4)]
            chords.append((new, degree, scale, triad))
        return chords

    def lines(self, rng, t, chords):
        """Chords of each beat -> five lines of notes [(tick, MIDI pitch)]: melody, three voices, bass."""
        melody, inner, bass = [], ([], [], []), []
        step = rng.randrange(10)  # of the scale, upwards: where the melody is
        for beat, (new, degree, scale, triad) in enumerate(chords):
            start = beat * TICKS
            # melody: a walk over the scale, moved to a chord tone on most beats
            rhythm = RHYTHMS[int(len(RHYTHMS) * rng.random() ** (1.5 - t.offbeat))]  # 1: rather the last ones
            for tick in range(TICKS):
                if rhythm[tick] and rng.random() < t.density:
                    step = 9 - abs(9 - abs(step + rng.choice((-2, -1, -1, 1, 1, 2))))  # reflected into 0..9
                    if tick == 0 and rng.random() < 0.75:
                        step -= (0, 1, 0, 1, 0, 1, -1)[(step - degree) % 7]  # to degree + 0, 2, 4 or 7
                    octave, note = divmod(step, 7)
                    pitch = place(t.tonic, t.low[0]) + scale[note] - t.tonic + 12 * octave
                    melody.append((start + tick, pitch))
            if t.texture == "solo":
                continue
            # chords: held or broken by a band, moving with the beat in a chorale
            turn = rng.randrange(3)  # which voice has which note
            spread = 4 if t.texture == "chorale" else 0  # semitones from voice to voice
            if t.arpeggio:
                for tick in (start, start + 2):
                    inner[0].append((tick, place(triad[tick // 2 % 3], t.low[1])))
            elif new or (spread and rng.random() < 0.6):
                for i, line in enumerate(inner):
                    line.append((start, place(triad[(i + turn) % 3], t.low[1] - spread * i)))
            # bass: roots, some fifths between them, rich: some thirds
            if new or rng.random() < 0.5:
                third = t.rich and rng.random() < 0.25
                fifth = not (third or new) and rng.random() >= 0.75
                tone = 1 if third else 2 if fifth else 0
                bass.append((start, place(triad[tone], t.low[2])))
        return melody, *inner, bass

    def perform(self, rng, t, lines, hits, tick_s, end):
        """Lines of notes, which last until tick `end`, and ticks of drums -> wave."""
        wave, fade = np.zeros(2 * SAMPLES, np.float32), np.linspace(1, 0, RELEASE, dtype=np.float32)
        for line, player in zip(lines, (0, 1, 1, 1, 2)):  # melody, three voices of chords, bass
            phase, envelopes = self.motion[t.names[player]]
            for (tick, pitch), (following, _) in zip(line, [*line[1:], (end, 0)]):  # until the next note
                start = int(tick * tick_s * SAMPLE_RATE)
                n = int((following - tick) * tick_s * t.legato * SAMPLE_RATE) + RELEASE
                hz = 440 * 2 ** ((pitch + t.detune - 69) / 12)
                at = (phase[:n] * (hz * TABLE / CYCLES)).astype(int) & (TABLE - 1)
                tone = sum(table[at] * envelope[:n] for table, envelope in zip(t.tables[player], envelopes))
                tone[-RELEASE:] *= fade
                wave[start:start + n] += t.gains[player] * math.exp(-t.dynamics * rng.random()) * tone
        for tick in hits:  # a hi-hat each time, kick and snare in turns
            start, n = int(tick * tick_s * SAMPLE_RATE), len(self.kick)
            noise = rng.choice(self.noise)[:n]
            hit = self.hat * noise + {0: self.kick, 4: self.snare * noise}.get(tick % 8, 0)
            wave[start:start + n] += t.drums * hit
        return wave

    def segment(self, rng, t):
        """-> wave [64000], the chord of each frame, beats and onsets in seconds, NaN beyond the last."""
        beat_s = 60 / t.tempo
        tick_s = beat_s / TICKS
        early = rng.random() * beat_s  # s by which the first beat lies before the segment
        chords = self.harmony(rng, t, int((SECONDS + early) / beat_s) + 1)
        lines, end = self.lines(rng, t, chords), len(chords) * TICKS
        hits = range(0, end, 2) if t.drums else ()  # twice a beat
        wave = self.perform(rng, t, lines, hits, tick_s, end)[int(early * SAMPLE_RATE):][:SAMPLES]
        wave = wave + t.hiss * rng.choice(self.noise)
        wave[:int(t.silent * SAMPLE_RATE)] = 0

        def heard(ticks, size):
            times = [s for tick in ticks if t.silent <= (s := tick * tick_s - early) < SECONDS]
            return times + [math.nan] * (size - len(times))
        begins = {tick for line in lines for tick, _ in line}.union(hits)
        of_beat = [root + 12 * ((third - root) % 12 == 3) for _, _, _, (root, third, _) in chords]
        beats = [int((frame * HOP / SAMPLE_RATE + early) / beat_s) for frame in range(FRAMES)]  # of frames
        first = round(t.silent * SAMPLE_RATE / HOP)  # the frame where sound begins; 24: no chord
        chord = [24 if t.texture == "solo" or i < first else of_beat[b] for i, b in enumerate(beats)]
        return wave, chord, heard(range(0, end, TICKS), BEATS), heard(sorted(begins), BEATS * TICKS)

# ---- Data: a folder of music ----------------------------------------------------------------------------

def brief(error):
    """The start of an error's message, on one line."""
    return " ".join(str(error).split())[:80] or type(error).__name__

def printable(name):
    """A file's name, which need not be valid text, as text."""
    return str(name).encode(errors="backslashreplace").decode()

class AudioFolder(Dataset):
    """Two random segments [2, samples] of each track (file) below `root`: wav, flac, ogg, mp3, any rate.

    Reads only the two segments (seek, mix to mono, resample; an mp3 is scanned up to them); their starts lie
    at most `gap` seconds apart. What cannot be used is found when it is read, kept in `skipped` {file:
    reason}, and another file is drawn in its place. FileNotFoundError for a missing or empty folder,
    RuntimeError once nothing is left."""
    SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

    def __init__(self, root, seconds=SECONDS, gap=30.0):
        self.root, self.seconds, self.gap = Path(root), seconds, gap
        self.skipped, self.unopened = {}, set()  # {file: reason}, for the user; those not to open again
        self.files, seen = [], set()
        unreadable = lambda error: self.skipped.update({printable(error.filename): brief(error)})
        for folder, below, names in os.walk(root, onerror=unreadable, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # links in a circle
                below.clear()
                continue
            seen.add(real)
            self.files += [os.path.join(folder, n) for n in names if n.lower().endswith(self.SUFFIXES)]
        self.files.sort()
        if not self.files:
            why = "; ".join([f"name a folder of {', '.join(self.SUFFIXES)} files", *self.skipped.values()])
            raise FileNotFoundError(f"{root}: no music here; {why[:200]}")

    def __len__(self):
        return len(self.files)

    def pair(self, index, generator=None):
        """Waves [2, samples] of track `index`, or of a random other one as long as that cannot be used."""
        for _ in range(100 + 10 * len(self.files)):
            a, b = torch.rand(2, generator=generator).tolist()  # drawn for each file alike, good or bad
            try:
                return self.read(self.files[index], a, b)
            except Exception as error:  # a broken file may raise anything; it is named and counted
                self.skipped[printable(self.files[index])] = brief(error)
            index = int(torch.randint(len(self.files), (), generator=generator))
        file, why = list(self.skipped.items())[-1]  # the first may be a folder
        raise RuntimeError(f"{self.root}: none of {len(self.files)} files can be used; {file}: {why}")

    __getitem__ = pair  # torch's own random state then decides where in the track

    def read(self, file, a, b):
        """Two segments of a file, at places a and b in 0..1."""
        import soundfile  # here, so that generated music needs no decoder
        need(os.path.isfile(file), "not a file, or gone")
        if file not in self.unopened:  # about a bad mp3 libsndfile prints pages: once is enough
            try:
                sound = soundfile.SoundFile(os.fsencode(file))
            except RuntimeError:
                self.unopened.add(file)
        need(file not in self.unopened, "not a sound file, broken or not permitted")
        with sound:
            rate, length = sound.samplerate, round(self.seconds * sound.samplerate)
            room = sound.frames - length  # places where a segment can start
            need(room >= 0, f"shorter than {self.seconds:g} s")
            first, segments = int(a * room), []  # where A starts; B starts between low and high
            low, high = max(0, first - int(self.gap * rate)), min(room, first + int(self.gap * rate))
            for start in (first, low + int(b * (high - low))):
                sound.seek(start)
                segments.append(sound.read(length, dtype="float32", always_2d=True).mean(1))
        need(min(map(len, segments)) == length, "ends before its header says")
        waves = torch.from_numpy(np.stack(segments))  # [2, length], at the file's own rate
        # at most 120 dB above full scale (NaN fails, too), at least -80 dB
        need(waves.abs().max() < 1e6, "holds NaN, infinity or numbers beyond all sound")
        need(waves.abs().amax(1).min() >= 1e-4, "silent where it was read")
        rate = 25 * round(rate / 25)  # at most 3 cents off above 7.2 kHz; exact, 44,101 Hz takes gigabytes
        waves = torchaudio.functional.resample(waves, rate, SAMPLE_RATE)  # itself, if the rates agree
        missing = round(self.seconds * SAMPLE_RATE) - waves.shape[1]  # a few, or below 0: F.pad then cuts
        return F.pad(waves, (0, missing)).clamp(-1, 1)

class Stream(Dataset):
    """Chunk i of a run's music, `fresh` tracks, as what the encoder eats, in half precision: mel
    [n, 2, 126, 128] and VQT [n, 2, 126, 99] in dB, or waves [n, 2, 64000]; and {file: reason} of bad files.

    A function of (config, rank, i) and the files, so that a run can stop and go on anywhere."""

    def __init__(self, config, rank=0):
        self.config, self.seed = config, config.seed * 4096 + rank
        self.folder = AudioFolder(config.data, gap=config.gap) if config.data else None
        # music of seeds below 4096 is never trained on: it calibrates, watches and tests
        self.music, self.front_end = SyntheticMusic(4096 + self.seed), FrontEnd()

    def generator(self, i):
        """Randomness of chunk or step i; torch reads only the low 32 bits of a seed."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + i) % 2 ** 32)

    def __getitem__(self, i):
        c, g, waves = self.config, self.generator(i), []
        progress = i / c.steps  # from 0 to 1
        # without --init generated music warms up; then some of it stays, lest a folder of few keys spoil `eq`
        # (measured, two runs: after two hours of game music real pieces were still .96 exact; alone, .92)
        if self.folder and (c.init or progress >= 2 * c.easy):
            n_files = math.ceil(c.fresh * (1 - c.generated))
            files = torch.randint(len(self.folder), (n_files,), generator=g).tolist()  # with repeats
            waves += [self.folder.pair(file, g) for file in files]  # [2, 64000] each
        if len(waves) < c.fresh:
            # first easy, then more and more rich: rich from the start led into the shortcut (prototype)
            rich = min(max(progress / c.easy - 1, 0), 1) if c.easy and not c.init else 1
            waves += [*self.music.batch(c.fresh - len(waves), i, rich)[0]]
        waves = torch.cat(waves)  # [2 fresh, 64000]
        features = (waves,) if c.encoder == "tune" else self.front_end(waves)
        skipped = self.folder.skipped if self.folder else {}
        return [x.half().unflatten(0, (-1, 2)) for x in features], skipped

# ---- What y says without labels, and whether it is key: the shortcut monitor ----------------------------

def pitch_fork():
    """A synthesised cadence I IV V I in C major [1, 64000]: as crops transpose it, y must rotate."""
    t = torch.arange(SAMPLES) / SAMPLE_RATE
    wave = torch.zeros(SAMPLES)
    for second, chord in enumerate(((36, 52, 55, 60), (41, 53, 57, 60), (43, 50, 55, 59), (36, 52, 55, 60))):
        gate = ((t - second) * 20).clamp(0, 1) * ((second + 1 - t) * 20).clamp(0, 1)  # ramps of 50 ms
        for note in chord:
            for h in range(1, 9):
                wave += gate * (2 * math.pi * h * 440 * 2 ** ((note - 69) / 12) * t).sin() / h ** 1.5
    return (wave / wave.abs().max())[None]

@torch.no_grad()
def key_profile(model, waves, offsets=(MIDDLE,)):
    """Waves [B, T] -> y at each crop, the crop's rotation undone [len(offsets), B, 12]; on the CPU."""
    y = torch.cat([model.pitch(chunk, offsets) for chunk in waves.split(64)], dim=1).cpu()
    return torch.stack([x.roll(c, -1) for x, c in zip(y, offsets)])  # a crop at c looks c semitones lower

def key_phase(profile):
    """Profiles [..., 12] -> their DFT at 7, complex [...]: points in the plane of the circle of fifths."""
    return torch.complex(*dft(profile))

@lru_cache
def calibration_music():
    """64 generated tracks of a seed that is never trained on, and their labels."""
    return SyntheticMusic(998).batch(64, 0)

def calibrate(model, device="cpu", offsets=(MIDDLE,)):
    """The mean profile [12] of music in C major and A minor: CPSD alone does not say which of y is C.

    Taken from 64 generated tracks, whose keys we know because we wrote them; no real music is labelled. One
    cadence is too pure: its y snaps to one pitch class, often beside real music's."""
    waves, labels = calibration_music()
    profile = key_profile(model, waves.flatten(0, 1).to(device), offsets).mean(0)  # [128, 12]
    down = labels["key_signature"].repeat_interleave(2).tolist()
    return torch.stack([x.roll(-semitones) for x, semitones in zip(profile, down)]).mean(0)

def key_signature(profile, in_c):
    """Profiles [..., 12] -> pitch class 0..11 of the relative major's tonic: how far up `in_c` fits best.

    Ours: two keys a fifth apart are neighbours in phase, yet unlike in the rest of y (measured, eight runs:
    real pieces .943 exact, by phase alone .921)."""
    return torch.stack([(profile * in_c.roll(tonic)).sum(-1) for tonic in range(12)], dim=-1).argmax(-1)

MONITOR = ("agree", "equivariance", "fork", "follows_key", "follows_offset", "exact", "fifth")

@torch.no_grad()
def monitor(model, waves, truth=None):
    """Has y learned key? Waves [n, 2, 64000], key signatures [n] if known -> {name: <= 1, NaN if unknown}.

    agree           phases of A and B
    equivariance    phases of A over crops 2, 5, 8, 11, 14 (a right angle apart), rotated back: near 1 only if
                    y rotates with the crop
    fork            the same of the pitch fork
    follows_key     1 if the phase of y is set by the true key signature
    follows_offset  1 if it is set by the crop's offset alone: the shortcut
    exact, fifth    label-free key signatures of tracks (both segments): right, within a fifth"""
    crops = (2, 5, MIDDLE, 11, 14)
    fork = key_phase(key_profile(model, pitch_fork().to(waves), crops))[:, 0].sgn()  # [5] unit phasors
    y_a = key_profile(model, waves[:, 0], crops)  # [5, n, 12]
    y_b = key_profile(model, waves[:, 1])[0]  # [n, 12], at the middle crop, as is y_a[2]
    a, b = key_phase(y_a).sgn(), key_phase(y_b).sgn()  # [5, n], [n]
    result = dict(agree=(a[2] * b.conj()).real.mean(), equivariance=a.mean(0).abs().mean(),
                  fork=fork.mean().abs(), follows_offset=a.mean().abs())
    if truth is not None:
        truth = truth.cpu()  # as profiles are
        count = torch.bincount(truth, minlength=12)
        weight = 1 / (count[truth] * (count > 0).sum())  # keys count alike: what follows them sums to 0
        away = (7 * (key_signature(y_a[2] + y_b, calibrate(model, waves.device)) - truth)) % 12  # in fifths
        result |= dict(follows_offset=(a.mean(0) * weight).sum().abs(), exact=(away == 0).float().mean(),
                       fifth=((away <= 1) | (away == 11)).float().mean(),
                       follows_key=(a * key_phase(torch.eye(12))[truth].conj()).mean().abs())
    return {name: float(result.get(name, math.nan)) for name in MONITOR}

def verdict(m):
    """What the figures of `monitor` say, in words."""
    if not (m["follows_offset"] < 0.3 and m["fork"] > 0.5 and m["equivariance"] > 0.5):  # NaN fails as well
        few = ", or few keys in this folder" if math.isnan(m["exact"]) else ""
        return f"SHORTCUT or nothing learned{few}: y follows the crop's offset, or does not rotate with it"
    how = "rotates" if min(m["fork"], m["equivariance"]) > 0.9 else "begins to rotate"
    words = f"y {how} with the crop (fork {m['fork']:.2f}, offset alone {m['follows_offset']:.2f})"
    if math.isnan(m["exact"]):
        return words
    return f"{words}; label-free key signature {m['exact']:.2f}, {m['fifth']:.2f} within a fifth"

# ---- The loop -------------------------------------------------------------------------------------------

def learning_rate(step, config):
    """Linear warm-up, then a cosine down to 5 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * min(1, (step + 1) / config.warmup) * (0.05 + 0.95 * cosine)

def autocast(device):
    """bf16 where the hardware multiplies in it (a step on CPU: 1.9 to 3 times as fast), else float32."""
    cpu = torch.cpu.get_capabilities()
    fast = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)

def losses(model, batch, g, encode=None):
    """The views of one step and their losses: batch as Stream gives it, each [B, 2, ...] -> {name: scalar}.
    encode: model.encode, or what torch.compile made of it.

    A and B are two segments of a track, A' is A again; each view has a crop of its own. The contrastive token
    learns from A and B as they sound, and from few frames, as each has the sound and none the tune (measured,
    instruments of real music: equalised .75 instead of .88; all frames .76, 16 .80, 3 .83, 1 .80).
    The equivariant token learns from A, B and A', each VQT equalised by itself, without mel."""
    c, dev, terms = model.config, batch[0].device, {}
    encode = encode or model.encode
    if c.encoder == "tune":
        with autocast(dev):
            z = encode(batch[0].transpose(0, 1).flatten(0, 1))  # [2B, P]: all A, then all B
        return {"nt_xent": nt_xent(*z.chunk(2), c.temperature)}

    def views(n, n_frames):
        """The first n of A, B, A -> mel and VQT in dB [nB, F, bins], the views' crops [nB], and the frames'
        places [F]: a random one out of each of n_frames equal parts of the 4 s, so that no part is missed
        (measured: windows .72 exact, from anywhere at random .70)."""
        edges = torch.arange(n_frames + 1) * FRAMES // n_frames
        frames = edges[:-1] + (torch.rand(n_frames, generator=g) * edges.diff()).long()
        frames = frames.to(dev, non_blocking=True)  # plain `to` would wait for all that runs on a GPU
        segments = [x[:, :, frames].unbind(1) for x in batch]  # A and B, of mel and of VQT
        mel, vqt = (torch.cat([a, b, a][:n]).float() for a, b in segments)
        offset = torch.randint(N_OFFSETS, (len(vqt),), generator=g).to(dev, non_blocking=True)
        return mel, vqt, offset, frames

    if "con" in c.tasks:
        mel, vqt, offset, frames = views(2, c.con_frames)  # [2B, F, bins]
        with autocast(dev):
            cls = encode(unit_range(mel), crop(unit_range(vqt), offset), frames, cls_only=True)[-1]
        terms["nt_xent"] = nt_xent(*model.head_con(cls[:, -1].float()).chunk(2), c.temperature)
    if "eq" in c.tasks:
        mel, vqt, offset, frames = views(3, c.frames)  # [3B, F, bins]
        vqt = unit_range(vqt + random_equaliser(len(vqt), c.eq_db, g).to(dev, non_blocking=True))
        mel = None if model.hides_mel else unit_range(mel)
        with autocast(dev):
            cls = encode(mel, crop(vqt, offset), frames, cls_only=True)[-1]
        logits = model.center(model.logits(cls[:, 0].float()), offset, training=True)
        y_a, y_b, y_shift = logits.softmax(-1).chunk(3)  # [B, 12] each
        c_a, c_b, c_shift = offset.chunk(3)  # [B] each; a higher offset looks lower
        terms["cpsd"] = (cpsd(y_a, y_b, c_a - c_b) + cpsd(y_a, y_shift, c_a - c_shift)
                         + cpsd(y_b, y_shift, c_b - c_shift))
    return terms

def save(path, content):
    """torch.save that leaves the old file or the new one, whenever the process or the machine dies."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only on its way, before the name changes hands
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ or error  # torch's own error hides the disk's, and Ctrl-C
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        raise OSError(f"{path}: cannot save ({brief(cause)}); the save before it is untouched") from None

def read_checkpoint(path, *needed):
    """-> content and its model. Plain data and tensors only (weights_only): nothing in a file can run."""
    try:
        # torch does not read the checksums
        need(zipfile.ZipFile(path).testzip() is None, "its checksums are wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "config", *needed} - content.keys()
        need(not missing, f"lacks {', '.join(sorted(missing))}")
        config = Config(**content["config"])
        # before anything is built: a block has 12 dim^2 weights, of 2 bytes at least
        least = 24 * config.depth * config.dim ** 2 if config.encoder == "vit" else 0
        need(os.path.getsize(path) > least, "its config asks for more weights than it holds")
        model = build(config)
        model.load_state_dict(content["model"])
        need(all(x.isfinite().all() for x in model.state_dict().values()), "weights are not finite")
        return content, model
    except Exception as error:  # a hostile or broken file may raise anything
        what = f"cut, foreign or not a checkpoint of mt2 ({brief(error)})"
        raise ValueError(f"{path}: {what}; name another folder") from None

def load(path, device="cpu"):
    """Run folder or model.pt -> model in eval mode. FileNotFoundError and ValueError say what is wrong."""
    path = Path(path)
    if path.is_dir() or not (path.is_file() or path.suffix == ".pt"):  # a run folder, even if missing
        path = path / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train: python mt2.py --out {path.parent}")
    return read_checkpoint(path)[1].to(device).eval()

def resume(config, out):
    """-> the state that `out` holds of this very run, None for a new one; refuses anything else."""
    if not (out / "state.pt").exists():
        alone = (out / "model.pt").exists()
        need(not alone, f"--out {out}: holds model.pt but no state.pt; name another folder")
        return None
    state, theirs = read_checkpoint(out / "state.pt", "optimizer", "step")
    possible = type(state["step"]) is int and 0 < state["step"] <= theirs.config.steps
    need(possible, f"{out}/state.pt: its step lies outside of its run; name another folder")
    for name, mine in vars(config).items():
        other = getattr(theirs.config, name)
        if name in ("data", "init"):
            mine, other = (x and os.path.normpath(x) for x in (mine, other))  # music/ is music
        may_differ = name in ("out", "device", "workers", "save_every", "compile")
        what = f"holds a run with {name} = {other}, not {mine}"
        need(mine == other or may_differ, f"--out {out}: {what}; name another folder")
    return state

def open_log(path, columns, last_step):
    """A CSV to append to, cut off after the rows up to last_step: never a repeat or half a line.

    It stays locked: two runs at once in one folder would spoil each other's saves."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", buffering=1, encoding="ascii", errors="replace", newline="\n")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); name another --out") from None
    try:
        import fcntl  # a lock that ends with the process, and that workers do not inherit
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{path}: another run is writing here; name another --out") from None
    except (ImportError, OSError):  # Windows, or a disk without locks
        pass
    header = ",".join(columns) + "\n"
    if not path.stat().st_size:
        file.write(header)
    file.seek(0)
    first, *rows = file.read().splitlines(keepends=True)
    need(first == header, f"{path}: not a log of mt2; name another --out")
    end = len(header)  # of what is kept, in bytes: in ascii, characters
    for row in rows:
        step, whole = row.split(",")[0], row.endswith("\n") and row.count(",") == len(columns) - 1
        if not (whole and step.isdigit() and int(step) <= last_step):
            break
        end += len(row)
    file.truncate(end)
    return file

def pick_device(name):
    """auto: cuda (each process its own), else cpu. No mps: torch 2.11 can be wrong there (pytorch 177116)."""
    there = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    name = there[0] if name == "auto" else name
    need(name in there, f"--device {name}: mt2 can use {' or '.join(there)} here")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)

def keep_memory():
    """Let the C library keep what is freed: by default large tensors go back to the system and are fetched
    anew, page by page, in every step (measured: a demo step takes .86 of the time, one of paper size .89)."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # not every C library has it
        mallopt(-4, 0)            # M_MMAP_MAX: take no memory from outside the heap
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: give none of it back

def end_with_the_loop(worker):
    """In a worker: Ctrl-C is for the loop alone, as a worker that it hits within its queue may never end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: at once; torch itself takes 5 s

def music_stream(c, rank, device, first, end):
    """-> the run's Stream, and an iterator over its chunks from `first` to before `end`, made by workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # a container's share of them; "max": all
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # the loop needs a core; 12: two chunks of each (MT2: 1.4 MB) fit a container's 64 MB of shared memory
    spare = cores // 2 if device.type == "cpu" else min(cores - 1, 12)
    workers = max(1, spare) if c.workers < 0 else c.workers  # 0: music is made between the steps
    # with more threads than free cores a step takes up to ten times as long (measured on CPU)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))
    if device.type == "cpu":
        keep_memory()
    stream = Stream(c, rank)
    return stream, iter(DataLoader(stream, batch_size=None, sampler=range(first, end), num_workers=workers,
                                   worker_init_fn=end_with_the_loop))

def train(config):
    """Train as `config` says -> the run folder. The same call again goes on where the last one stopped.

    ValueError, OSError, RuntimeError, FloatingPointError say in one line what is wrong. Sets torch's seed and
    number of threads and, on CPU, how malloc works. A script that calls it needs `if __name__ == "__main__":`
    where workers import it anew (macOS, Windows)."""
    # device, processes, run folder
    c, device, out = config, pick_device(config.device), Path(config.out)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else every process takes some memory of the first GPU as well
        # on an H200, cuDNN's backward of one query to 128 keys can be NaN (NVIDIA/cudnn-frontend issue 1072)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    rank = dist.get_rank() if dist.is_initialized() else 0
    state = resume(c, out)
    done = state["step"] if state else 0
    if len(set(gather(torch.tensor([done], device=device)).tolist())) > 1:
        raise ValueError(f"--out {out}: processes see different saves; name a folder that all machines share")
    if done >= c.steps:
        if rank == 0:
            old = [p.stat().st_mtime_ns if p.exists() else 0 for p in (out / "model.pt", out / "state.pt")]
            if old[0] < old[1]:  # killed between its last two saves
                save(out / "model.pt", {k: state[k] for k in ("config", "model")})
            print(f"{out}: already trained for all of its {done} steps")
        return out

    # model and optimiser (betas as published); weight decay on matrices only
    torch.manual_seed(c.seed)
    model = build(c)
    if c.init and not state:
        theirs = load(c.init)
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, theirs)]
        if shapes[0] != shapes[1] or theirs.config.heads != c.heads:
            raise ValueError(f"--init {c.init}: a model of another shape; give its --size, --tasks")
        model.load_state_dict(theirs.state_dict())
    model.to(device).train()
    # not dynamic, as each task has one shape: a demo step takes .83 of the time, dynamic .87 (measured)
    encode = torch.compile(model.encode, dynamic=False) if c.compile else model.encode
    matrices, others = [], []
    for name, p in model.named_parameters():
        (others if p.ndim < 2 or name in ("cls", "position") else matrices).append(p)
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.98), fused=True)
    if state:
        model.load_state_dict(state["model"])
        try:
            # moments alone: options stay as they were set above
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})
            for p in model.parameters():
                count, *moments = (optimizer.state[p][k] for k in ("step", "exp_avg", "exp_avg_sq"))
                good = all(m.shape == p.shape and m.isfinite().all() for m in moments)
                if not (good and 0 < count.item() <= done):  # AdamW would write beyond a short one's end
                    raise ValueError("moments of other weights")
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # the file is not to blame
            raise
        except Exception as error:
            what = f"does not fit its own config ({brief(error)}); name another folder"
            raise ValueError(f"{out}/state.pt: {what}") from None

    # music: chunks of `fresh` tracks go round a ring, the pool. In step s it holds the last `slots` of chunks
    # 0 to s + ahead - 1; a resumed run makes these again, from the oldest on
    slots = math.ceil(c.pool / c.fresh)
    ahead = min(slots, math.ceil(2 * c.batch / c.fresh))  # enough for two batches before the first step
    next_chunk = max(0, done + ahead - slots)
    stream, chunks = music_stream(c, rank, device, next_chunk, c.steps - 1 + ahead)
    pool, skipped = None, {}

    if rank == 0:
        log = open_log(out / "log.csv", ("step", "loss", "nt_xent", "cpsd", "lr", "tracks_per_s"), done)
        watch = open_log(out / "monitor.csv", ("step", "sound", *MONITOR), done)
        clips, size = 2 * c.batch * world_size(), sum(p.numel() for p in model.parameters())
        chance = {"con": f"nt_xent {math.log(clips - 1):.2f} ({clips - 2} negatives)", "eq": "cpsd 3.00"}
        print(f"{c.encoder} {'+'.join(c.tasks)} on {'+'.join(c.inputs)}: {size:,} parameters, "
              f"{world_size()} x {device}, {clips * SECONDS:.0f} s of sound a step\n"
              f"at chance {', '.join(chance[t] for t in c.tasks)}; {out}: steps {done} to {c.steps}")
        if c.compile:
            print("the first step compiles the encoder, which takes a minute or two")
        watched = {"generated": SyntheticMusic(999).batch(128, 0)} if "eq" in c.tasks else {}
        if c.data:  # 64 of its tracks, without labels, the same at every save; if none can be used, stop now
            g, folder = torch.Generator().manual_seed(0), stream.folder
            tracks = torch.stack([folder.pair(i % len(folder), g) for i in range(64)])
            watched |= {"folder": (tracks, {})} if "eq" in c.tasks else {}
    weighted = lambda terms: terms.get("nt_xent", 0) + c.eq_weight * terms.get("cpsd", 0)
    bad, begin = 0, time.time()  # updates that failed in a row; speed counts from here
    bar = tqdm(total=c.steps, initial=done, unit="step", disable=rank > 0, dynamic_ncols=True)
    say = bar.write if rank == 0 else lambda text: None
    for step in range(done, c.steps):
        # fresh tracks into the pool, a batch out of it
        while next_chunk < step + ahead:
            fresh, found = next(chunks)
            pool = pool or [torch.zeros(slots, *x.shape, dtype=x.dtype, device=device) for x in fresh]
            for ring, x in zip(pool, fresh):
                ring[next_chunk % slots] = x.to(device, non_blocking=True)
            for file, why in found.items():
                if file not in skipped and len(skipped) < 3:
                    say(f"skipped {file} ({why})")
                skipped[file] = why
            next_chunk += 1
        g = stream.generator(step)
        filled = min(next_chunk, slots) * c.fresh  # tracks in the pool
        pick = torch.randperm(filled, generator=g)[:c.batch].to(device, non_blocking=True)  # no repeats
        statistics = [b.clone() for b in model.buffers()]  # to undo a bad step
        terms = losses(model, [ring.flatten(0, 1)[pick] for ring in pool], g, encode)

        # the update, unless its gradient is not finite
        lr = learning_rate(step, c)
        optimizer.zero_grad()
        weighted(terms).backward()
        if world_size() > 1:
            average([p.grad for p in model.parameters()])  # no gradient is None: all are used
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # the one moment at which the loop waits for the device
        *values, norm = torch.stack([*terms.values(), norm]).tolist()
        values = dict(zip(terms, values))
        bad = 0 if math.isfinite(norm) else bad + 1
        if not bad:
            for group in optimizer.param_groups:
                group["lr"] = lr
            # decay on a cosine from 0.04 to 0.01, as published
            optimizer.param_groups[0]["weight_decay"] = 0.025 + 0.015 * math.cos(math.pi * step / c.steps)
            optimizer.step()
        else:
            for b, before in zip(model.buffers(), statistics):
                b.copy_(before)
            what = ", ".join(k for k, v in values.items() if not math.isfinite(v)) or "the gradient"
            say(f"step {step + 1}: {what} is not finite, update skipped ({bad} in a row)")
            if bad == 10 or step + 1 == c.steps:
                raise FloatingPointError(f"{out}: {bad} bad updates; earlier saves stand; lower --lr")

        # log, watch for the shortcut, save
        if rank == 0:
            loss = weighted(values)
            rate = (step + 1 - done) * c.batch * world_size() / (time.time() - begin)  # tracks a second
            row = loss, values.get("nt_xent", math.nan), values.get("cpsd", math.nan), lr, rate
            log.write(f"{step + 1}," + ",".join(f"{x:.6g}" for x in row) + "\n")
            bar.set_postfix(loss=loss, **values, tracks_s=f"{rate:.0f}")
            bar.update()
            if step + 1 == c.steps or (step + 1) % c.save_every == 0:  # time for a look and a save
                if skipped:
                    say(f"step {step + 1}: skipped {len(skipped)} files so far, or passages of them")
                for sound, (waves, labels) in watched.items():
                    m = monitor(model, waves.to(device), labels.get("key_signature"))
                    watch.write(f"{step + 1},{sound}," + ",".join(f"{v:.4f}" for v in m.values()) + "\n")
                    say(f"step {step + 1}, {sound} music: {verdict(m)}")
                if not bad:
                    content = {"config": dataclasses.asdict(c), "model": model.state_dict()}
                    save(out / "state.pt", content | {"optimizer": optimizer.state_dict(), "step": step + 1})
                    save(out / "model.pt", content)
    bar.close()
    return out

# ---- The command line -----------------------------------------------------------------------------------

def stop(words):
    """After Ctrl-C: says so and dies by its signal, so that a shell's loop over seeds stops as well."""
    print(words, file=sys.stderr)
    sys.stdout.flush()  # a death by signal writes no buffers
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)

def main():
    """One flag per field of Config."""
    parser = argparse.ArgumentParser(description="Train MT2 (or TUNe, CLMR) without labels. See README.md.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: sys.exit(f"mt2: {message}; python mt2.py --help lists the flags")
    for field in dataclasses.fields(Config):
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default,
                            help=field.metadata["help"], type=str if field.type is tuple else field.type)
    try:
        out = train(Config(**vars(parser.parse_args())))
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{out}/model.pt is trained; what it knows: python probe.py {out}")
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        message = f"mt2: {lines[-1 if 'DataLoader worker' in lines[0] else 0]}"  # a worker's cause comes last
        remedies = (("tried to allocate", "lower --batch, --pool or --dim"), ("</torch_", "try --workers 0"),
                    ("dataloader worker (pid", "try --workers 0"),
                    ("no space left", "make room; the same command goes on"))
        message += next((f"; {what}" for sign, what in remedies if sign in message.lower()), "")
        if world_size() > 1:  # NCCL's farewell below would wait for processes that wait for this one
            print(message, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)
        sys.exit(message)
    except KeyboardInterrupt:
        stop("\nmt2: stopped; the same command goes on from the last save")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # names of files may hold what a screen cannot show
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # a killed run's lines stay
    main()
