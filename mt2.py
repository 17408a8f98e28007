"""MT2 in one file: two class tokens, two losses, no labels (Kong et al., WASPAA 2025, arXiv 2507.12996).

A Vision Transformer reads music as one patch per spectrogram frame. Two class tokens go with the frames:
`eq` learns what key the music is in (CPSD: transposing the input must rotate the output), `con` learns what
the music sounds like (NT-Xent: two segments of a track must agree). Nobody ever tells it a key.

    python mt2.py                             # train the demo on generated music, then say what was learned
    python mt2.py --data my_music/            # the same on a folder of wav, flac, ogg and mp3 files
    torchrun --nproc-per-node 8 mt2.py ...    # the same on many GPUs

The file reads in the order in which sound flows: wave, spectrogram, patches, transformer, class tokens,
losses, data, loop, command line. "Ours" marks every choice that the papers leave open.
"""
import argparse
import dataclasses
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------
# Config: every number that a run depends on. Each field is a command-line flag.
# ---------------------------------------------------------------------------------------------------------

SIZES = {"demo": dict(dim=96, depth=3, heads=3, lr=2e-3, frames=16),   # minutes on two laptop cores (ours)
         "paper": dict(dim=192, depth=12, heads=3, lr=1e-3, frames=126)}  # ViT-Tiny, 5.5 M parameters
SAMPLE_RATE, SECONDS, HOP = 16000, 4.0, 512        # the paper's input: 4 s of mono 16 kHz sound
SAMPLES = int(SAMPLE_RATE * SECONDS)               # 64,000 samples
FRAMES = SAMPLES // HOP + 1                        # 126 frames of 32 ms
N_MELS, N_BINS, N_CROP, N_OFFSETS = 128, 99, 84, 16  # 99 VQT bins, of which a crop at offset 0..15 keeps 84


def knob(default, text):
    """A Config field with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:
    """Every hyper-parameter of a run. None means: taken from `size`."""
    data: str = knob("", "folder of music files; empty: music made on the fly by SyntheticMusic")
    out: str = knob("runs/demo", "run folder for model.pt, state.pt, log.csv and monitor.csv")
    init: str = knob("", "run folder or model.pt whose weights to start from")
    size: str = knob("demo", "demo | paper: preset for dim, depth, heads, lr, frames")
    tasks: tuple = knob(("eq", "con"), "class tokens, in token order: eq,con | eq | con")
    inputs: tuple = knob(("mel", "vqt"), "spectrogram branches: mel,vqt | mel | vqt; their tokens are added")
    encoder: str = knob("vit", "vit: MT2 | tune: TUNe and CLMR, on the waveform, contrastive only")
    expansion: int = knob(4, "of TUNe: expansion layers, 1..4; 0 is CLMR's SampleCNN")
    steps: int = knob(1200, "optimiser steps (paper: about 1000 epochs of 512)")
    batch: int = knob(128, "tracks per step, per process (paper: 128)")
    seed: int = knob(0, "seed of the weights, the music and the views")
    device: str = knob("auto", "auto | cpu | cuda | mps")
    # model
    dim: int = knob(None, "width of the tokens (paper: 192)")
    depth: int = knob(None, "transformer blocks (paper: 12)")
    heads: int = knob(None, "attention heads (paper: 3)")
    proj_dim: int = knob(64, "width of the contrastive embedding z; ours")
    # views
    frames: int = knob(None, "random frames of a segment per training view, at most 126; ours for the demo")
    eq_db: float = knob(4.0, "std in dB per octave knot of the random EQ of each view, 0 for none; ours")
    hide_mel: int = knob(1, "1: the equivariant views see no mel, which would leak absolute pitch; ours")
    # losses and optimiser
    temperature: float = knob(0.1, "of NT-Xent (paper: 0.1)")
    eq_weight: float = knob(3.0, "weight of CPSD beside NT-Xent; ours")
    lr: float = knob(None, "peak learning rate; ours")
    warmup: int = knob(50, "steps of linear warm-up; ours")
    # data
    fresh: int = knob(12, "new tracks per step; the others of a batch are heard again from a pool; ours")
    pool: int = knob(2048, "tracks remembered in the pool; ours")
    easy: float = knob(0.35, "share of the run with easy generated music before the ramp to rich music; ours")
    gap: float = knob(30.0, "seconds: segments A and B of a file start at most this far apart; ours")
    workers: int = knob(-1, "processes that prepare music; -1: none for generated music, else half of the cores")
    save_every: int = knob(200, "steps between saves")

    def __post_init__(self):
        for name in ("tasks", "inputs"):
            value = getattr(self, name)
            setattr(self, name, tuple(value.split(",")) if isinstance(value, str) else tuple(value))
        if self.size not in SIZES:
            raise ValueError(f"--size {self.size}: choose one of {', '.join(SIZES)}")
        for name, value in SIZES[self.size].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, allowed in (("tasks", ("eq", "con")), ("inputs", ("mel", "vqt"))):
            chosen = getattr(self, name)
            if not chosen or [a for a in allowed if a in chosen] != list(chosen):
                raise ValueError(f"--{name} {','.join(chosen)}: choose {','.join(allowed)} or one of them")
        if "eq" in self.tasks and "vqt" not in self.inputs:
            raise ValueError("--tasks eq needs --inputs vqt: only the VQT can be transposed by a crop")
        if self.encoder not in ("vit", "tune"):
            raise ValueError(f"--encoder {self.encoder}: choose vit or tune")
        if self.encoder == "tune":
            self.tasks, self.inputs = ("con",), ()
        if self.dim % self.heads:
            raise ValueError(f"--dim {self.dim} cannot be divided among --heads {self.heads}")
        for name, least in dict(batch=2, steps=1, dim=1, depth=1, heads=1, proj_dim=1, frames=1, warmup=1, fresh=1,
                                pool=self.batch, save_every=1, gap=0, expansion=0, workers=-1, seed=0, eq_db=0).items():
            if not getattr(self, name) >= least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        for name, most in dict(frames=FRAMES, expansion=4, fresh=self.pool, easy=0.5).items():
            if not getattr(self, name) <= most:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at most {most}")
        if not (self.temperature >= 0.01 and self.lr > 0):
            raise ValueError(f"--temperature {self.temperature} --lr {self.lr}: at least 0.01, and above 0")


# ---------------------------------------------------------------------------------------------------------
# Wave -> spectrogram
# ---------------------------------------------------------------------------------------------------------

def unit_range(db, floor=80.0):
    """Decibels [B, frames, bins] -> [0, 1]: dB below the clip's own loudest bin, 80 dB floor, then dB/80 + 1.

    Each clip is scaled by itself alone, and a clip that is silent throughout (below -80 dBFS) becomes 0."""
    loudest = db.amax((1, 2), keepdim=True).clamp_min(-floor)
    return ((db - loudest) / floor + 1).clamp(0, 1)


class VQT(nn.Module):
    """Variable-Q transform as a few matrix products, one per octave.

    Bin j is a Hann-windowed complex sinusoid at fmin * 2^(j / bins_per_octave) Hz, correlated with the wave
    around each hop. Its length is sample_rate / (alpha f + gamma) (Schoerkhuber et al., 2014): gamma > 0 Hz
    trades pitch for time resolution in the bass. Kernels of one octave share a window, so that a transform
    is nine products of overlapping frames with [window, 2 x 12] matrices: measured 0.7 ms per 4 s clip on
    2 cores, against 1.7 to 4 for FFT-domain kernels with a folded inverse FFT.
    """

    def __init__(self, sample_rate=16000, hop=512, fmin=27.5, n_bins=99, bins_per_octave=12, gamma=0.0):
        super().__init__()
        freq = fmin * 2 ** (torch.arange(n_bins, dtype=torch.float64) / bins_per_octave)  # Hz
        if freq[-1] > sample_rate / 2:
            raise ValueError(f"VQT: the highest bin, {freq[-1]:.0f} Hz, lies above half of {sample_rate} Hz")
        alpha = 2 ** (1 / bins_per_octave) - 1
        length = sample_rate / (alpha * freq + gamma)  # window lengths in samples
        self.hop, self.groups = hop, math.ceil(n_bins / bins_per_octave)
        for i in range(self.groups):
            f, width = (v[i * bins_per_octave:(i + 1) * bins_per_octave] for v in (freq, length))
            t = torch.arange(-int(width[0] / 2), int(width[0] / 2) + 1, dtype=torch.float64)[:, None]
            hann = torch.cos(math.pi * t / width) ** 2 * (t.abs() < width / 2)
            hann = 2 * hann / hann.sum(0)  # a sine of amplitude a reads a, in every bin
            angle = 2 * math.pi * f / sample_rate * t
            kernel = torch.cat([hann * angle.cos(), hann * angle.sin()], dim=1)  # [window, 2 x 12]
            self.register_buffer(f"kernel{i}", kernel.float(), persistent=False)

    def magnitude(self, wave):
        """Wave [B, T] -> linear magnitude [B, T // hop + 1, n_bins], centred frames, zeros beyond the edges."""
        reach = self.kernel0.shape[0] // 2
        frames = wave.shape[-1] // self.hop + 1
        padded = F.pad(wave, (reach, reach + self.hop))
        octaves = []
        for i in range(self.groups):
            kernel = self.get_buffer(f"kernel{i}")
            start = reach - kernel.shape[0] // 2
            windows = padded[:, start:].unfold(-1, kernel.shape[0], self.hop)[:, :frames]  # [B, frames, window]
            real, imag = (windows @ kernel).chunk(2, dim=-1)
            octaves.append((real.square() + imag.square()).sqrt())
        return torch.cat(octaves, dim=-1)

    def decibels(self, wave):
        """Wave [B, T] -> dB below a full-scale sine [B, frames, n_bins], at least -120."""
        return 20 * self.magnitude(wave).clamp_min(1e-6).log10()

    def forward(self, wave):
        """Wave [B, T] -> log-magnitude [B, frames, n_bins] in [0, 1]."""
        return unit_range(self.decibels(wave))


class FrontEnd(nn.Module):
    """Both spectrograms of a wave in dB, before anything that depends on the view (EQ, scaling, crop)."""

    def __init__(self):
        super().__init__()
        self.vqt = VQT(SAMPLE_RATE, HOP, n_bins=N_BINS)
        with warnings.catch_warnings():  # 128 bands of 1024 points leave a few bass bands empty: as published
            warnings.simplefilter("ignore")
            self.mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=1024, hop_length=HOP, n_mels=N_MELS)
        for buffer in ("spectrogram.window", "mel_scale.fb"):  # constants: kept out of checkpoints
            module, name = buffer.split(".")
            getattr(self.mel, module)._non_persistent_buffers_set.add(name)

    @torch.no_grad()
    def forward(self, wave):
        """Wave [B, T] -> mel dB [B, frames, 128], VQT dB [B, frames, 99]; 0 dB is about full scale."""
        with torch.autocast(wave.device.type, enabled=False):
            power = self.mel(wave).transpose(1, 2) / 256 ** 2  # half of the Hann window's sum
            return 10 * power.clamp_min(1e-12).log10(), self.vqt.decibels(wave)


class RandomEQ(nn.Module):
    """A random smooth frequency response, the same for the mel and the VQT of a view (ours).

    Each view draws its own: a curve shared by A, B and A' moves with the crop, and CPSD then follows the
    curve instead of the key (measured: label-free key signature .09 instead of .90)."""

    def __init__(self, knots=9):
        super().__init__()
        mel_hz = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), N_MELS + 2)[1:-1] / 2595) - 1)
        vqt_hz = 27.5 * 2 ** (torch.arange(N_BINS) / 12)
        for name, hz in (("to_mel", mel_hz), ("to_vqt", vqt_hz)):
            octave = torch.log2(hz / 27.5).clamp(0, knots - 1)  # one knot an octave, linear in between
            hat = (1 - (octave - torch.arange(knots)[:, None]).abs()).clamp_min(0)  # [knots, bins]
            self.register_buffer(name, hat, persistent=False)

    def forward(self, n, std_db, generator):
        """-> dB to add to mel [n, 1, 128] and to VQT [n, 1, 99]; drawn on the generator's device."""
        knots = self.to_mel.shape[0]
        curve = torch.randn(n, knots, generator=generator, device=generator.device)
        tilt = torch.randn(n, 1, generator=generator, device=generator.device)
        slope = torch.arange(knots, device=generator.device) - (knots - 1) / 2
        curve = std_db * (curve + 0.25 * tilt * slope)
        return (curve @ self.to_mel)[:, None], (curve @ self.to_vqt)[:, None]


def crop(vqt, offset):
    """VQT [B, frames, 99], offsets [B] in 0..15 -> [B, frames, 84]. Offset + 1 looks one semitone lower."""
    bins = offset[:, None] + torch.arange(N_CROP, device=vqt.device)  # [B, 84]
    return vqt.gather(2, bins[:, None].expand(-1, vqt.shape[1], -1))


# ---------------------------------------------------------------------------------------------------------
# Spectrogram -> patches -> transformer -> class tokens
# ---------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm transformer block (ViT): x + attention(norm(x)), then x + MLP(norm(x)). [B, N, D] -> [B, N, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def attention(self, x):
        """Softmax weights [B, heads, N, N] of this block, for looking at."""
        q, k, _ = self.split(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    def split(self, x):
        B, N, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, D // self.heads)
        return qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, heads, N, D / heads]

    def forward(self, x):
        q, k, v = self.split(x)
        if x.is_cuda:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:  # on CPU the fused kernel's backward is slower for short sequences: a step of 18 tokens took 2.7 times as long
            mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Output(NamedTuple):
    """What MT2 says of a batch; None where the model lacks the task."""
    y: torch.Tensor       # [B, 12] probabilities over pitch classes, from the equivariant token
    z: torch.Tensor       # [B, P] contrastive embedding
    tokens: torch.Tensor  # [B, n_cls + frames, dim] final layer, class tokens first


class MT2(nn.Module):
    """One ViT over spectrogram frames, with a class token per task.

    Frames of both branches are added: token_t = patch(mel_t) + patch(vqt_t) + position_t. Each class token is
    a learned vector plus the time-mean of its own branch (eq: VQT, con: mel), plus its position.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.class_tokens = config.tasks
        dim, n_cls = config.dim, len(config.tasks)
        self.front_end = FrontEnd()
        patch = lambda bins: nn.Sequential(nn.LayerNorm(bins), nn.Linear(bins, dim), nn.GELU())
        self.patch_mel = patch(N_MELS) if "mel" in config.inputs else None
        self.patch_vqt = patch(N_CROP) if "vqt" in config.inputs else None
        self.cls = nn.Parameter(0.02 * torch.randn(n_cls, dim))
        self.position = nn.Parameter(0.02 * torch.randn(n_cls + FRAMES, dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features ** -0.5)
                nn.init.zeros_(module.bias)
        if "con" in config.tasks:
            self.head_con = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, config.proj_dim))
        if "eq" in config.tasks:
            self.head_eq = nn.Linear(dim, N_CROP)
            self.register_buffer("offset_mean", torch.zeros(N_OFFSETS, 12))  # running statistics of the logits,
            self.register_buffer("logit_std", torch.ones(12))                # for `center` outside of training
            self.start_as_folded_spectrum()

    @torch.no_grad()
    def start_as_folded_spectrum(self):
        """At first y is close to the spectrum folded into one octave: an orthonormal VQT patch, undone by the
        equivariant head, and small residual branches (as in GPT-2). Ours: beside the contrastive loss, the
        default start does not get going (measured: key signature .08 instead of .92 after 940 steps)."""
        dim = self.config.dim
        basis = torch.linalg.qr(torch.randn(max(dim, N_CROP), min(dim, N_CROP)))[0]
        self.patch_vqt[1].weight.copy_(1.5 * (basis if dim >= N_CROP else basis.T))
        self.head_eq.weight.copy_(1.5 * self.patch_vqt[1].weight.T)
        nn.init.zeros_(self.head_eq.bias)
        for block in self.blocks:
            block.out.weight.mul_(0.2)
            block.mlp[2].weight.mul_(0.2)

    def encode(self, mel, vqt, mel_on=None, frames=None, every_layer=False):
        """Features in [0, 1], mel [B, F, 128] and vqt [B, F, 84] -> tokens [B, n_cls + F, dim].

        mel_on [B] of 0 and 1 hides the mel branch of single clips; frames [F] are the frames' places among 126;
        every_layer gives [depth + 1, B, n_cls + F, dim] (input, each block; the final norm on the last)."""
        branch = {}
        if self.patch_mel is not None:
            branch["mel"] = self.patch_mel(mel)  # [B, F, dim]
            if mel_on is not None:
                branch["mel"] = branch["mel"] * mel_on[:, None, None]
        if self.patch_vqt is not None:
            branch["vqt"] = self.patch_vqt(vqt)
        own = {"eq": branch.get("vqt"), "con": branch.get("mel", branch.get("vqt"))}
        means = torch.stack([own[task].mean(1) for task in self.class_tokens], dim=1)  # [B, n_cls, dim]
        x = torch.cat([self.cls + means, sum(branch.values())], dim=1)
        n_cls = len(self.class_tokens)
        where = torch.arange(x.shape[1] - n_cls, device=x.device) if frames is None else frames
        x = x + torch.cat([self.position[:n_cls], self.position[n_cls:][where]])
        layers = [x]
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        layers[-1] = self.norm(x)
        return torch.stack(layers) if every_layer else layers[-1]

    def logits(self, token):
        """Equivariant token [B, dim] -> [B, 12]: 84 bins, averaged over the seven octaves."""
        return self.head_eq(token).float().view(-1, 7, 12).mean(1)

    def center(self, logits, offset):
        """Logits [B, 12] minus their mean over all clips of the same crop offset, over their std (ours).

        Averaged over many songs, no key is preferred at any crop. Without this CPSD is solved by reading the
        offset off the spectral envelope, and no key is learned (measured: .08 instead of .90)."""
        if self.training:
            same = F.one_hot(offset, N_OFFSETS).to(logits.dtype)  # [B, 16]
            total = all_sum(torch.cat([same.T @ logits, same.sum(0)[:, None]], dim=1))  # [16, 12 + 1]
            count = total[:, 12:].clamp_min(1)
            mean = total[:, :12] / count
            logits = logits - mean[offset]
            var = all_sum(logits.square().mean(0)) / world_size()
            with torch.no_grad():
                self.offset_mean.lerp_(mean, 0.1 * (total[:, 12:] > 0))
                self.logit_std.lerp_((var + 1e-5).sqrt(), 0.1)
            return logits / (var + 1e-5).sqrt()
        return (logits - self.offset_mean[offset]) / self.logit_std

    def features(self, wave, offset=None):
        """Wave [B, T] at 16 kHz, T at most 4 s -> mel, cropped VQT in [0, 1], and the offsets [B] used."""
        if wave.ndim != 2 or not HOP <= wave.shape[1] <= SAMPLES:
            raise ValueError(f"MT2 takes waves [B, T] with {HOP} <= T <= {SAMPLES}, not {list(wave.shape)}")
        mel, vqt = self.front_end(wave)
        offset = N_OFFSETS // 2 if offset is None else offset
        offset = torch.as_tensor(offset, device=wave.device).expand(len(wave))
        return unit_range(mel), crop(unit_range(vqt), offset), offset

    def layers(self, wave, offset=None):
        """Wave [B, T] -> [depth + 1, B, n_cls + frames, dim]. As in training, the equivariant token comes from
        a pass that sees no mel; all other tokens see both branches."""
        mel, vqt, _ = self.features(wave, offset)
        x = self.encode(mel, vqt, every_layer=True)
        if self.hides_mel():
            eq = self.encode(mel, vqt, torch.zeros(len(wave), device=wave.device), every_layer=True)
            x = torch.cat([eq[:, :, :1], x[:, :, 1:]], dim=2)
        return x

    def pitch(self, wave, offsets=(N_OFFSETS // 2,)):
        """y alone, at several crop offsets: wave [B, T] -> [len(offsets), B, 12], with one front end for all."""
        mel, vqt = (unit_range(x) for x in self.front_end(wave))
        mel_on = torch.zeros(len(wave), device=wave.device) if self.hides_mel() else None
        y = []
        for offset in torch.tensor(offsets, device=wave.device)[:, None].expand(-1, len(wave)):
            token = self.encode(mel, crop(vqt, offset), mel_on)[:, 0]  # eq comes first
            y.append(self.center(self.logits(token), offset).softmax(-1))
        return torch.stack(y)

    def hides_mel(self):
        """Whether there is a mel branch to hide from an equivariant token."""
        return bool(self.config.hide_mel) and "eq" in self.class_tokens and "mel" in self.config.inputs

    def forward(self, wave, offset=None):
        """Wave [B, T] -> Output(y, z, tokens); offset int or [B] in 0..15, None for the middle crop."""
        tokens = self.layers(wave, offset)[-1]
        cls = dict(zip(self.class_tokens, tokens.unbind(1)))
        offset = torch.as_tensor(N_OFFSETS // 2 if offset is None else offset, device=wave.device).expand(len(wave))
        y = self.center(self.logits(cls["eq"]), offset).softmax(-1) if "eq" in cls else None
        z = self.head_con(cls["con"]) if "con" in cls else None
        return Output(y, z, tokens)


class TUNe(nn.Module):
    """Tailed U-Net on the waveform (Vélez Vásquez & Burgoyne, ISMIR 2022); expansion 0 is CLMR's SampleCNN.

    Contraction: convolutions of 11, 22, .. 176 channels with max-pooling by 3 in between. Expansion: transposed
    convolutions back up, each joined with its contraction stage. Tail: down again to one vector of 512, each stage
    joined with its expansion stage (TUNe+). Published for 59,049 = 3^10 samples at 22,050 Hz; here the middle 59,049
    of the project's 64,000 at 16 kHz, so that all pooling divides and all systems hear the same music (ours)."""
    SAMPLES, WIDTHS = 3 ** 10, (11, 22, 44, 88, 176)

    def __init__(self, config):
        super().__init__()
        self.config, self.class_tokens, up = config, (), config.expansion
        conv = lambda i, o, stride=1: nn.Sequential(  # same length, or a third of it
            nn.Conv1d(i, o, 3, stride, 1 if stride == 1 else 0), nn.BatchNorm1d(o), nn.ReLU())
        w = self.WIDTHS
        if up:
            self.down = nn.ModuleList(conv(i, o) for i, o in zip((1,) + w, w))
            self.grow = nn.ModuleList(nn.ConvTranspose1d(w[-i], w[-i - 1], 3, 3) for i in range(1, up + 1))
            self.join = nn.ModuleList(conv(2 * w[-i - 1], w[-i - 1]) for i in range(1, up + 1))
            joined = [conv(w[i - 1] + w[i], w[i]) for i in range(5 - up, 5)]
            self.tail = nn.ModuleList(joined + [conv(176, 352), *(conv(352, 352) for _ in range(3)), conv(352, 512)])
        else:
            widths = (128, 128, 128, 256, 256, 256, 256, 256, 256, 512)
            self.down = nn.ModuleList([conv(1, 128, 3)] + [conv(i, o) for i, o in zip(widths, widths[1:])])
            self.last = conv(512, 512)
        self.head_con = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, config.proj_dim))

    def layers(self, wave):
        """Wave [B, T], T at most 64,000 -> every stage, as a list of [B, frames_l, dim_l]."""
        short = max(0, self.SAMPLES - wave.shape[1])
        x = F.pad(wave, (0, short))[:, None, (wave.shape[1] + short - self.SAMPLES) // 2:][..., :self.SAMPLES]
        stages, up = [], self.config.expansion
        for i, conv in enumerate(self.down):
            x = conv(x if i == 0 or not up else F.max_pool1d(x, 3))
            x = x if i == 0 or up else F.max_pool1d(x, 3)
            stages.append(x)
        for i in range(up):
            x = self.join[i](torch.cat([self.grow[i](x), stages[3 - i]], dim=1))
            stages.append(x)
        for i, conv in enumerate(self.tail if up else ()):
            x = F.max_pool1d(x, 3)
            x = conv(torch.cat([x, stages[3 + up - i]], dim=1) if i < up else x)
            stages.append(x)
        if not up:
            stages.append(self.last(x))
        return [stage.transpose(1, 2) for stage in stages]

    def forward(self, wave):
        """Wave [B, T] -> z [B, P]: the last stage averaged over time, projected."""
        return self.head_con(self.layers(wave)[-1].mean(1))


# ---------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------

def world_size():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x):
    """Sum over all processes, with gradient."""
    if world_size() == 1:
        return x
    import torch.distributed.nn.functional as dist_nn
    return dist_nn.all_reduce(x)


class NTXent(torch.autograd.Function):
    """NT-Xent of unit rows z [2B, P] with the closed-form gradient (DESIGN: dL/dZ = (G + G^T) Z / 2Bt)."""

    @staticmethod
    def forward(ctx, z, temperature, block):
        n = len(z)
        total = z.new_zeros(n)  # sum over j != i of exp((s_ij - 1) / t): cosines are at most 1, so exp never overflows
        for i in range(0, n, block):
            e = NTXent.strip(z, i, block, temperature)  # rows i.., columns i..: the matrix is symmetric
            total[i:i + block] += e.sum(1)
            total[i + block:] += e[:, block:].sum(0)
        ctx.save_for_backward(z, total)
        ctx.temperature, ctx.block = temperature, block
        positive = (z[:n // 2] * z[n // 2:]).sum(1)
        return total.log().mean() + (1 - positive.mean()) / temperature

    @staticmethod
    def strip(z, i, block, temperature):
        e = torch.addmm(z.new_full((), -1 / temperature), z[i:i + block], z[i:].T, alpha=1 / temperature).exp_()
        e.diagonal().zero_()
        return e

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z, total = ctx.saved_tensors
        n, block = len(z), ctx.block
        inverse, dz = 1 / total, torch.zeros_like(z)
        for i in range(0, n, block):
            g = NTXent.strip(z, i, block, ctx.temperature)
            g *= inverse[i:i + block, None] + inverse[i:]  # P + P^T
            dz[i:i + block] += g @ z[i:]
            dz[i + block:] += g[:, block:].T @ z[i:i + block]
        dz -= 2 * z.roll(n // 2, 0)  # Y + Y^T
        return dz * (grad / (n * ctx.temperature)), None, None


def nt_xent(a, b, temperature=0.1):
    """NT-Xent (SimCLR): a, b [B, P], any scale; row i of a and row i of b are one track -> scalar.

    l(i) = -log exp(sim(i, p(i)) / t) / sum_{j != i} exp(sim(i, j) / t), over the 2B rows of a and b."""
    with torch.autocast(a.device.type, enabled=False):
        z = torch.cat([a, b])
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        z = z.double() if temperature < 0.025 else z  # exp(-2 / t) underflows in float32
        return NTXent.apply(F.normalize(z, dim=-1), temperature, 512).to(torch.promote_types(a.dtype, torch.float32))


def phase(y, omega=7):
    """DFT of y [B, 12] at one frequency -> [B, 2] (re, im). omega = 7: circle of fifths; 1: of semitones."""
    angle = 2 * math.pi * omega / 12 * torch.arange(12, device=y.device, dtype=y.dtype)
    return torch.stack([(y * angle.cos()).sum(-1), -(y * angle.sin()).sum(-1)], dim=-1)


def cpsd(y_a, y_b, k, omega=7):
    """Cross-power spectral density loss: mean of D_k = |exp(2 pi i omega k / 12) - yhat_a conj(yhat_b)|^2.

    y_a, y_b [B, 12] probabilities, k int or [B]: view b looks k semitones higher than view a. 0 if y_b is y_a
    rolled by k and both are one-hot; 1 if either is uniform. Real arithmetic, so that it compiles and autocasts."""
    (a_re, a_im), (b_re, b_im) = phase(y_a, omega).unbind(-1), phase(y_b, omega).unbind(-1)
    angle = 2 * math.pi * omega / 12 * torch.as_tensor(k, device=y_a.device, dtype=y_a.dtype)
    re, im = a_re * b_re + a_im * b_im, a_im * b_re - a_re * b_im  # yhat_a conj(yhat_b)
    return ((angle.cos() - re).square() + (angle.sin() - im).square()).mean()


# ---------------------------------------------------------------------------------------------------------
# Data: generated music
# ---------------------------------------------------------------------------------------------------------

#               slope  even  formant attack decay  fading vibrato stretch
INSTRUMENTS = {  # of harmonic amplitudes h^-slope; x even for even h; Hz (0: none); s; s; rows/s; depth; per h^2
    "piano":    (1.60, 1.00,     0, 0.003,  1.0,   2.0, 0.000, 6e-4),
    "guitar":   (1.30, 1.00,   400, 0.002,  0.5,   4.0, 0.000, 1e-4),
    "strings":  (1.10, 1.00,  1500, 0.080,  9.0,   0.0, 0.004, 0.0),
    "flute":    (2.40, 1.00,     0, 0.050,  9.0,   0.0, 0.003, 0.0),
    "clarinet": (1.10, 0.08,  1200, 0.030,  9.0,   0.0, 0.000, 0.0),
    "brass":    (0.80, 1.00,   900, 0.040,  9.0,   0.6, 0.002, 0.0),
    "organ":    (0.90, 1.80,     0, 0.012,  9.0,   0.0, 0.000, 0.0),
    "bells":    (1.80, 0.50,     0, 0.002,  1.5,   2.5, 0.000, 9e-3),
    "voice":    (1.20, 1.00,   650, 0.070,  9.0,   0.0, 0.006, 0.0),
    "synth":    (0.80, 1.00,     0, 0.008,  9.0,   0.3, 0.000, 0.0)}
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
# Functional harmony: chance of the next degree (columns) after each (rows), I..VII and i..VII. Diminished
# triads are left out, so that every chord is a major or a minor triad.
NEXT_DEGREE = (((.10, .15, .08, .25, .27, .15, 0), (.10, .05, .05, .15, .55, .10, 0), (.10, .10, .02, .35, .08, .35, 0),
                (.30, .12, .03, .05, .40, .10, 0), (.55, .03, .04, .10, .05, .23, 0), (.10, .25, .10, .30, .20, .05, 0),
                (1.0, 0, 0, 0, 0, 0, 0)),
               ((.10, 0, .10, .25, .20, .20, .15), (1.0, 0, 0, 0, 0, 0, 0), (.20, 0, .05, .15, .10, .30, .20),
                (.35, 0, .05, .05, .30, .10, .15), (.60, 0, .05, .10, .05, .15, .05), (.15, 0, .20, .10, .20, .05, .30),
                (.50, 0, .25, .05, .05, .10, .05)))
RHYTHMS = ((1, 0, 0, 0), (1, 0, 1, 0), (1, 0, 1, 1), (1, 1, 1, 1), (1, 0, 0, 1), (0, 0, 1, 0))  # onsets in a beat
BEATS, TICKS = 14, 4         # a segment holds at most 14 beats (180 a minute), a beat four ticks
BLOCK = 64                   # control signals change every 64 samples (4 ms)
CYCLES, TABLE, FADES = 8, 8192, 4  # a wavetable: 8 periods in 8192 samples, in 4 versions from bright to dark


class SyntheticMusic:
    """Music out of (seed, step) alone: chords that follow functional harmony, a melody, a bass, perhaps drums.

    A track has a key, up to three players, a tempo and a texture; its two 4 s segments share these but not the
    notes. `rich` tracks add harmonic minor, secondary dominants, chorales and solos, strange timbres, rooms and
    silence to what easy tracks have. All ours; constants were set by ear and by the transfer to real music.
    """

    def __init__(self, seed=0, device="cpu"):
        self.seed, self.device = seed, torch.device(device)
        decay = -6.9 * torch.arange(SAMPLES) / SAMPLE_RATE / torch.linspace(0.2, 1.6, 16)[:, None]  # 16 rooms
        noise = torch.randn(16, SAMPLES, generator=torch.Generator().manual_seed(0))
        tails = noise * decay.exp()
        self.rooms = torch.fft.rfft(tails / tails.norm(dim=1, keepdim=True)).to(self.device)  # [16, SAMPLES / 2 + 1]

    def batch(self, n, step, rich=1.0):
        """-> waves [n, 2, 64000] in [-1, 1] and labels, each a tensor that starts with n:

        key 0..23 (tonic, + 12 if minor), key_signature 0..11 (tonic of the relative major), instrument 0..9 (of
        the lead), tempo (BPM); chord [n, 2, 126] per frame (root, + 12 if minor; 24: no chord); beats [n, 2, 14]
        and onsets [n, 2, 56] in seconds, padded with NaN. `rich` is the share of rich tracks."""
        with torch.no_grad():
            self.g = torch.Generator(self.device).manual_seed((self.seed * 1_000_003 + step) % 2 ** 63)
            track = self.track(n, rich)
            score = self.score({k: v.repeat_interleave(2, 0) for k, v in track.items()})
            waves = self.render(track, score)
            waves = self.finish(waves, {k: v.repeat_interleave(2, 0) for k, v in track.items()})
        labels = {"key": track["tonic"] + 12 * track["minor"], "instrument": track["players"][:, 0],
                  "key_signature": (track["tonic"] + 3 * track["minor"]) % 12, "tempo": track["tempo"]}
        labels |= {name: score[name].unflatten(0, (n, 2)) for name in ("chord", "beats", "onsets")}
        return waves.unflatten(0, (n, 2)), labels

    def uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=self.g, device=self.device)

    def chance(self, p, *shape):
        return torch.rand(shape, generator=self.g, device=self.device) < p

    def choice(self, options, *shape):
        options = torch.as_tensor(options, device=self.device)
        return options[torch.randint(len(options), shape, generator=self.g, device=self.device)]

    def track(self, n, rich):
        """What both segments of a track share."""
        rich = self.chance(rich, n)
        band = ~rich | self.chance(0.4, n)
        solo = ~band & self.chance(0.3, n)
        players = torch.rand(n, len(INSTRUMENTS), generator=self.g, device=self.device).argsort(1)[:, :3]
        same = rich & self.chance(0.6, n)
        players = torch.where(same[:, None], players[:, :1], players)
        drums = 10 ** self.uniform(-1, -0.1, n) * (band & self.chance(0.85, n) & ~(rich & self.chance(0.5, n)))
        return dict(
            rich=rich, band=band, solo=solo, players=players, drums=drums,
            tonic=torch.randint(12, (n,), generator=self.g, device=self.device), minor=self.chance(0.5, n).long(),
            tempo=60 * 3 ** self.uniform(0, 1, n), detune=self.uniform(-0.25, 0.25, n),
            beats_per_chord=torch.where(rich, self.choice([1, 2, 2, 4], n), 2), arpeggio=band & self.chance(0.35, n),
            lead_low=self.uniform(53, 69, n).long(), chord_low=self.uniform(48, 60, n).long(),
            bass_low=self.uniform(31, 41, n).long(), density=self.uniform(0.7, 1, n),
            busy=self.uniform(0, 1, n), legato=self.uniform(0.6, 1, n), dynamics=self.uniform(0, 0.7, n) * rich,
            gain=10 ** self.uniform(-0.4, 0, n, 3) * torch.tensor([1.1, 0.6, 0.9], device=self.device),
            jitter=self.uniform(2, 4, n) + 4 * rich, room=torch.randint(16, (n,), generator=self.g, device=self.device),
            wet=10 ** self.uniform(-0.7, -0.05, n) * (rich & self.chance(0.6, n)), level=10 ** self.uniform(-0.6, 0, n),
            hiss=10 ** self.uniform(-4, -2.5, n), silent=self.uniform(0, 1.5, n) * (rich & self.chance(0.1, n)))

    def score(self, t):
        """Notes of S segments (each track's row twice): pitch, onset tick, length and loudness per voice and tick.

        Five voices: melody, three chord voices, bass. A tick is a quarter of a beat; [S, 5, 56]."""
        S, T, dev = len(t["tonic"]), BEATS * TICKS, self.device
        tick = torch.arange(T, device=dev)
        beat = tick // TICKS
        # harmony: a walk over degrees, each chord lasting beats_per_chord beats
        per = t["beats_per_chord"][:, None]
        into = (self.uniform(0, 1, S, 1) * per).long()
        chord = (beat + into) // per  # [S, T] index of the chord at a tick
        change = ((beat + into) % per == 0) & (tick % TICKS == 0)
        change[:, 0] = True
        table = torch.tensor(NEXT_DEGREE, device=dev)[t["minor"]].cumsum(-1)  # [S, 7, 7]
        degree = torch.zeros(S, BEATS + 4, dtype=torch.long, device=dev)
        draw = self.uniform(0, 0.9999, S, BEATS + 4)
        last = torch.zeros(S, dtype=torch.long, device=dev)
        for c in range(BEATS + 4):
            last = (draw[:, c, None] > table[torch.arange(S, device=dev), last]).sum(1)
            degree[:, c] = last
        degree = degree.gather(1, chord)  # [S, T]
        scale = torch.tensor([MAJOR, MINOR], device=dev)[t["minor"]][:, None].repeat(1, T, 1)  # [S, T, 7]
        held = lambda p: self.chance(p, S, BEATS + 4).gather(1, chord)  # one throw per chord
        raised = t["rich"][:, None] & (t["minor"][:, None] == 1) & (degree == 4) & held(0.95)  # harmonic minor
        scale[..., 6] += raised
        scale[..., 5] += raised & held(0.4)  # melodic minor
        third = (degree + 2) % 7
        secondary = t["rich"][:, None] & (t["minor"][:, None] == 0) & held(0.06) & ((degree == 1) | (degree == 2) | (degree == 5))
        scale.scatter_add_(2, third[..., None], secondary[..., None].long())  # a secondary dominant: major third
        steps = (degree[..., None] + torch.tensor([0, 2, 4], device=dev)) % 7
        triad = (t["tonic"][:, None, None] + scale.gather(2, steps)) % 12  # [S, T, 3] pitch classes
        place = lambda pc, low: low + (pc - low) % 12
        # melody: a walk over scale degrees that prefers chord tones on the beat
        rhythm = self.uniform(0, 0.999, S, BEATS) ** (1.5 - t["busy"][:, None])
        rhythm = torch.tensor(RHYTHMS, device=dev)[(rhythm * len(RHYTHMS)).long()].bool()  # [S, BEATS, TICKS]
        plays = self.chance(t["density"][:, None], S, BEATS)[..., None]
        onset = [(rhythm & plays).flatten(1)]
        walk = (self.choice([-2, -1, -1, 1, 1, 2], S, T) * onset[0]).cumsum(1) + self.choice(range(18), S, 1)
        walk = 9 - (walk % 18 - 9).abs()  # reflected into 0..9
        snap = torch.tensor([0, -1, 0, -1, 0, -1, 1], device=dev)[(walk - degree) % 7]
        walk = walk + snap * ((tick % TICKS == 0) & self.chance(0.75, S, T))
        floor = place(t["tonic"], t["lead_low"])[:, None]
        pitch = [floor + 12 * (walk // 7) + scale.gather(2, (walk % 7)[..., None])[..., 0]]
        # chords: a band holds them or plays them as arpeggios, a chorale moves with the beat
        band, solo, arpeggio = (t[k][:, None] for k in ("band", "solo", "arpeggio"))
        moves = change | (~band & (tick % TICKS == 0) & self.chance(0.6, S, T))
        eighth = tick % 2 == 0
        turn = self.choice([0, 1, 2], S, BEATS + 4).gather(1, chord)
        for voice in range(3):
            tone = (voice + turn) % 3
            if voice == 0:
                tone = torch.where(arpeggio, tick // 2 % 3, tone)
                onset.append(torch.where(arpeggio, eighth, moves) & ~solo)
            else:
                onset.append(moves & ~arpeggio & ~solo)
            low = t["chord_low"][:, None] - torch.where(band, 0, 4 * voice)
            pitch.append(place(triad.gather(2, tone[..., None])[..., 0], low))
        fifth = self.chance(0.25, S, T).long() * 2 * ~change  # the bass: roots, some fifths
        onset.append((change | ((tick % TICKS == 0) & self.chance(0.5, S, T))) & ~solo)
        pitch.append(place(triad.gather(2, fifth[..., None])[..., 0], t["bass_low"][:, None]))
        # from onsets to notes: when the note that sounds at a tick began, and how long it lasts
        onset, pitch = torch.stack(onset, 1), torch.stack(pitch, 1)  # [S, 5, T]
        began = torch.where(onset, tick, -1).cummax(-1).values
        until = torch.where(onset, tick, T).flip(-1).cummin(-1).values.flip(-1)
        until = F.pad(until[..., 1:], (0, 1), value=T)
        held = began.clamp_min(0)
        length = (until.gather(2, held) - held) * t["legato"][:, None, None]
        loud = torch.exp(-1.5 * t["dynamics"][:, None, None] * self.uniform(0, 1, S, 5, T)).gather(2, held) * (began >= 0)
        # labels
        tick_s = 60 / t["tempo"] / TICKS  # seconds per tick
        early = self.uniform(0, 1, S) * tick_s * TICKS  # the segment starts somewhere within a beat
        time = tick * tick_s[:, None] - early[:, None]
        heard = lambda flag, time: time.masked_fill(~flag | (time < t["silent"][:, None]) | (time >= SECONDS), math.nan)
        now = torch.arange(FRAMES, device=dev) * HOP / SAMPLE_RATE
        at = ((now + early[:, None]) / tick_s[:, None]).long().clamp_max(T - 1)  # [S, 126]
        minor = (triad[..., 1] - triad[..., 0]) % 12 == 3
        names = torch.where(solo, 24, triad[..., 0] + 12 * minor)
        struck = onset.any(1) | ((t["drums"][:, None] > 0) & eighth)
        return dict(pitch=pitch.gather(2, held), began=held, length=length, loud=loud, tick_s=tick_s, early=early,
                    chord=names.gather(1, at), beats=heard(tick >= 0, time)[:, ::TICKS], onsets=heard(struck, time))

    def wavetables(self, t, pitch):
        """One periodic waveform per track, voice and stage of fading [n, 6, 4, 8192]; the sixth is the kick's sine.

        A table holds eight periods, so that a partial may lie at any eighth of a harmonic (stretched strings)."""
        n, dev = len(t["tonic"]), self.device
        preset = torch.tensor(list(INSTRUMENTS.values()), device=dev)[t["players"]]  # [n, 3, 8]
        slope, even, formant, _, _, _, _, stretch = preset[..., None].unbind(2)  # [n, 3, 1]
        h = torch.arange(1, 25, device=dev)
        hertz = 440 * 2 ** ((pitch - 69) / 12)  # [n, 3] mean pitch of the player's part
        f = h * hertz[..., None]
        amp = h ** -slope * torch.where(h % 2 == 0, even, 1.0)
        bump = 0.15 + torch.exp(-((f / formant.clamp_min(1)).log2() / 1.0) ** 2)
        amp = amp * torch.where(formant > 0, bump, 1.0)
        amp = amp * 10 ** (t["jitter"][:, None, None] * torch.randn(n, 3, 24, generator=self.g, device=dev) / 20)
        amp = amp * (f < 5500)  # a fifth of room for higher notes below the Nyquist frequency
        amp = amp[:, :, None] * h ** (-0.5 * torch.arange(FADES, device=dev)[:, None])  # [n, 3, 4, 24]
        amp = amp / amp[:, :, :1].norm(dim=-1, keepdim=True)
        turns = self.uniform(0, 2 * math.pi, n, 3, 1, 24)
        bins = (CYCLES * h * (1 + stretch * h * h).sqrt()).round().long()[:, :, None].expand(-1, -1, FADES, -1)
        spectrum = torch.zeros(n, 3, FADES, TABLE // 2 + 1, dtype=torch.complex64, device=dev)
        spectrum.scatter_add_(3, bins.clamp_max(TABLE // 2), torch.polar(amp, turns.expand_as(amp)))
        tables = torch.fft.irfft(spectrum, norm="forward")
        sine = (2 * math.pi * CYCLES / TABLE * torch.arange(TABLE, device=dev)).sin().expand(n, 1, FADES, TABLE)
        return torch.cat([tables[:, [0, 1, 1, 1, 2]], sine], dim=1)

    def render(self, track, s):
        """Notes -> waves [S, 64000]: control signals every 4 ms, then one table look-up per sample and voice."""
        t = {k: v.repeat_interleave(2, 0) for k, v in track.items()}
        S, dev = len(s["early"]), self.device
        part = s["pitch"].float().unflatten(0, (-1, 2)).mean((1, 3))  # [n, 5] mean pitch of a voice
        tables = self.wavetables(track, torch.stack([part[:, 0], part[:, 1:4].mean(1), part[:, 4]], 1) + 3)
        player = torch.tensor(list(INSTRUMENTS.values()), device=dev)[t["players"]][:, [0, 1, 1, 1, 2]]  # [S, 5, 8]
        attack, decay, fading, vibrato = player[..., 3:7, None].unbind(2)  # [S, 5, 1]
        now = torch.arange(SAMPLES // BLOCK + 1, device=dev) * BLOCK / SAMPLE_RATE  # [1001] seconds
        tick = (now + s["early"][:, None]) / s["tick_s"][:, None]  # [S, 1001]
        at = tick.long().clamp_max(BEATS * TICKS - 1)[:, None].expand(-1, 5, -1)
        pitch, began, length, loud = (s[k].gather(2, at) for k in ("pitch", "began", "length", "loud"))
        age = (tick[:, None] - began) * s["tick_s"][:, None, None]  # [S, 5, 1001] seconds since the onset
        left = (length * s["tick_s"][:, None, None] - age) / 0.04 + 1  # notes are released within 40 ms
        gain = t["gain"][:, [0, 1, 1, 1, 2], None]
        env = gain * loud * (age / attack).clamp_max(1) * torch.exp(-age / decay) * left.clamp(0, 1)
        hertz = 440 * 2 ** ((pitch + t["detune"][:, None, None] - 69) / 12)
        turn = 2 * math.pi * (5 + t["busy"][:, None, None]) * now  # vibrato at 5 to 6 Hz
        cycle = hertz * (age + vibrato * turn.sin() / (2 * math.pi * 5.5))
        row = (age * fading).clamp(0, FADES - 1).long()
        # the kick drum is a sixth voice, a falling sine; snare, hi-hat and hiss are one noise with an envelope
        beat = tick / TICKS
        since = beat % 1 * TICKS * s["tick_s"][:, None]
        even = (beat.long() % 2 == 0).float()
        kick = 0.8 * even * t["drums"][:, None] * torch.exp(-since / 0.06) * (since < 0.4)
        cycle = torch.cat([cycle, (50 * since + 3 * (1 - torch.exp(-since / 0.03)))[:, None]], 1)
        hertz = torch.cat([hertz, (50 + 100 * torch.exp(-since / 0.03))[:, None]], 1)
        env = torch.cat([env, kick[:, None]], 1)
        row = torch.cat([row, torch.zeros_like(row[:, :1])], 1)
        hat = 0.12 * torch.exp(-(tick % 2) * s["tick_s"][:, None] / 0.015)
        snare = 0.35 * (1 - even) * torch.exp(-since / 0.05)
        noise_env = t["drums"][:, None] * (hat + snare) + t["hiss"][:, None]
        sounding = now >= t["silent"][:, None]  # [S, 1001]
        env, noise_env = env * sounding[:, None], noise_env * sounding
        ramp = torch.arange(BLOCK, device=dev)
        linear = lambda x: torch.lerp(x[..., :-1, None], x[..., 1:, None], ramp / BLOCK).flatten(-2)
        noise = torch.randn(S, SAMPLES, generator=self.g, device=dev) * linear(noise_env)
        first = (cycle / CYCLES % 1)[..., :-1, None]  # place in the table at each block's start, 0..1
        speed = (hertz / CYCLES / SAMPLE_RATE)[..., :-1, None]
        base = (row * TABLE)[..., :-1, None]
        waves, rows = [], S if dev.type == "cuda" else 2  # on CPU two segments at a time stay in the cache: twice as fast
        for i in range(0, S, rows):
            j = slice(i, i + rows)
            place = torch.addcmul(first[j], speed[j], ramp).frac_().mul_(TABLE).long().add_(base[j])
            table = tables[i // 2:(i + rows) // 2].flatten(2).repeat_interleave(2, 0)  # [rows, 6, 4 x 8192]
            voice = table.gather(2, place.flatten(2)).mul_(linear(env[j]))
            waves.append(voice.sum(1).add_(noise[j]))
        return torch.cat(waves)

    def finish(self, waves, t):
        """Room and level. The room's tail wraps around, as if the piece had begun before the segment."""
        heard = torch.fft.rfft(waves)
        heard = heard * (1 + t["wet"][:, None] * self.rooms[t["room"]])
        waves = torch.fft.irfft(heard, SAMPLES)
        return waves * t["level"][:, None] / waves.abs().amax(1, keepdim=True).clamp_min(1e-6)


# ---------------------------------------------------------------------------------------------------------
# Data: a folder of music
# ---------------------------------------------------------------------------------------------------------

class AudioFolder(Dataset):
    """Two random segments [2, samples] of each track (file) below `root`: wav, flac, ogg, mp3; any rate, any channels.

    Reads only the two segments (seek, then mono, then 16 kHz). Their starts lie at most `gap` seconds apart.
    What cannot be used is found when it is read, counted in `skipped` ({file: reason}), and another file is taken
    at random. Raises FileNotFoundError for a missing or empty folder, RuntimeError when nothing usable is left."""
    SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

    def __init__(self, root, seconds=SECONDS, gap=30.0):
        if not Path(root).is_dir():
            raise FileNotFoundError(f"{root}: no such folder; --data wants a folder of wav, flac, ogg or mp3 files")
        self.root, self.seconds, self.gap, self.skipped = Path(root), seconds, gap, {}
        walk = ((folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
        self.files = sorted(os.path.join(f, n) for f, n in walk if n.lower().endswith(self.SUFFIXES))
        if not self.files:
            raise FileNotFoundError(f"{root}: holds no file that ends in {', '.join(self.SUFFIXES)}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        """Waves [2, samples] of track `index`; where it lies in the track is up to torch's own random state."""
        return self.pair(index, torch.Generator().manual_seed(int(torch.randint(2 ** 62, ()))))

    def pair(self, index, generator):
        """Waves [2, samples] of track `index`, or of a random other one if that cannot be used."""
        while len(self.skipped) < len(self.files):
            file = self.files[index]
            if file not in self.skipped:
                try:
                    return self.read(file, generator)
                except Exception as error:  # whatever a broken file makes a decoder raise: said once, counted
                    self.skipped[file] = " ".join(str(error).split())[:120] or type(error).__name__
            index = int(torch.randint(len(self.files), (), generator=generator))
        first = next(iter(self.skipped.items()))
        raise RuntimeError(f"{self.root}: none of its {len(self.files)} files can be used; {first[0]}: {first[1]}")

    def read(self, file, generator):
        import soundfile  # here, so that generated music needs no decoder
        if not os.path.isfile(file):
            raise ValueError("not a file, or gone")
        with soundfile.SoundFile(file) as sound:
            rate, length = sound.samplerate, int(self.seconds * sound.samplerate)
            room = sound.frames - length
            if room < 0:
                raise ValueError(f"shorter than a segment of {self.seconds:g} s")
            u, v = torch.rand(2, generator=generator).tolist()
            a = int(u * room)
            low, high = max(0, a - int(self.gap * rate)), min(room, a + int(self.gap * rate))
            segments = []
            for start in (a, int(low + v * (high - low))):
                sound.seek(start)
                samples = sound.read(length, dtype="float32", always_2d=True).mean(1)
                if len(samples) < length:
                    raise ValueError("ends before its header says")
                segments.append(samples)
        waves = torch.from_numpy(np.stack(segments))
        if not waves.isfinite().all():
            raise ValueError("holds NaN or infinity")
        if rate != SAMPLE_RATE:
            waves = torchaudio.functional.resample(waves, rate, SAMPLE_RATE)
        if waves.abs().amax(1).min() < 1e-4:
            raise ValueError("silent")
        return F.pad(waves, (0, 1))[:, :int(self.seconds * SAMPLE_RATE)].clamp(-1, 1)


class Stream(Dataset):
    """Chunk i of a run's music, `fresh` tracks, as what the encoder eats: mel [n, 2, 126, 128] and VQT [n, 2, 126, 99]
    in dB, or waves [n, 2, 64000], in half precision; and the files found unusable, {file: reason}.

    A function of (config, i, rank) alone, so that a run can stop and go on anywhere."""

    def __init__(self, config, rank=0, device="cpu"):
        self.config, self.rank, self.device = config, rank, device
        self.folder = AudioFolder(config.data, gap=config.gap) if config.data else None
        self.music = SyntheticMusic((config.seed + 1) * 4096 + rank, device)
        self.front_end = FrontEnd().to(device)

    def __getitem__(self, i):
        c, skipped = self.config, {}
        progress = i / c.steps
        if self.folder and (c.init or progress >= 2 * c.easy):
            g = torch.Generator().manual_seed(((c.seed + 1) * 4096 + self.rank) * 2 ** 32 + i)
            waves = torch.stack([self.folder.pair(int(torch.randint(len(self.folder), (), generator=g)), g)
                                 for _ in range(c.fresh)]).to(self.device)
            skipped = self.folder.skipped
        else:
            # easy music, then a ramp to rich music: rich music from the start led into the offset shortcut
            rich = 1.0 if c.init else min(max(progress / c.easy - 1, 0), 1) if c.easy else 1.0
            waves, _ = self.music.batch(c.fresh, i, rich)
        if c.encoder == "tune":
            return (waves.half(),), skipped
        return tuple(x.half().unflatten(0, (-1, 2)) for x in self.front_end(waves.flatten(0, 1))), skipped


# ---------------------------------------------------------------------------------------------------------
# What y says without labels: the pitch fork and the shortcut monitor
# ---------------------------------------------------------------------------------------------------------

def pitch_fork():
    """A synthesised cadence I IV V I in C major [1, 64000]: as it is transposed by crops, y must rotate."""
    t = torch.arange(SAMPLES) / SAMPLE_RATE
    wave = torch.zeros(SAMPLES)
    for second, chord in enumerate(((36, 52, 55, 60), (41, 53, 57, 60), (43, 50, 55, 59), (36, 52, 55, 60))):
        gate = ((t - second) * 20).clamp(0, 1) * ((second + 1 - t) * 20).clamp(0, 1)
        for note in chord:
            for h in range(1, 9):
                wave += gate * (2 * math.pi * h * 440 * 2 ** ((note - 69) / 12) * t).sin() / h ** 1.5
    return (wave / wave.abs().max())[None]


@torch.no_grad()
def key_phase(model, waves, offsets=(N_OFFSETS // 2,)):
    """Waves [B, T] -> y on the circle of fifths, the crop's rotation undone: complex [len(offsets), B]."""
    y = torch.cat([model.pitch(chunk, offsets) for chunk in waves.split(64)], dim=1)  # [offsets, B, 12]
    undo = torch.tensor([-2j * math.pi * 7 * c / 12 for c in offsets]).exp().to(y.device)
    return torch.view_as_complex(phase(y).contiguous()) * undo[:, None]


def calibrate(model, device="cpu", offsets=(N_OFFSETS // 2,)):
    """The unit phasor that stands for C major and A minor: the one rotation of y that CPSD leaves free.

    Taken from 64 generated tracks, whose keys are known because we wrote them; no label of real music. A single
    cadence is too pure: its y snaps to one pitch class, a quarter of a fifth beside real music (measured: exact
    key signature of real pieces .77 instead of .90)."""
    waves, labels = SyntheticMusic(998).batch(64, 0)
    turn = torch.exp(2j * math.pi * 7 / 12 * labels["key_signature"].repeat_interleave(2).to(device))
    return (key_phase(model, waves.flatten(0, 1).to(device), offsets).sgn() * turn).mean().sgn()


def key_signature(phasor, c_major):
    """Complex phasors -> pitch class 0..11 of the relative major's tonic; 0 (C) where they point with c_major."""
    fifths = torch.angle(phasor * c_major.conj()) * (-12 / (2 * math.pi))
    return (7 * fifths.round().long()) % 12


MONITOR = ("agree", "equivariance", "fork", "follows_key", "follows_offset", "exact", "fifth")


@torch.no_grad()
def monitor(model, waves, truth=None):
    """Is it key that y has learned? Waves [n, 2, 64000], key signatures [n] if known -> dict, each from 0 to 1:

    agree: phases of A and B. equivariance: phases of A over crops 2, 5, 8, 11, 14, a right angle apart, each rotated
    back; fork: the same of the pitch fork. Near 1 only if y rotates with the crop. follows_key and follows_offset:
    how well the phase follows the true key signature, and the crop alone (the shortcut). exact, fifth: label-free
    key signature of the tracks (both segments), and within a fifth of it."""
    unit = torch.sgn  # z / |z|
    crops = (2, 5, 8, 11, 14)
    fork = unit(key_phase(model, pitch_fork().to(waves), crops)[:, 0])  # [5]
    a, b = unit(key_phase(model, waves[:, 0], crops)), unit(key_phase(model, waves[:, 1]))  # [5, n], [1, n]
    result = dict(agree=(a[2] * b[0].conj()).real.mean(), equivariance=a.mean(0).abs().mean(),
                  fork=fork.mean().abs(), follows_offset=a.mean().abs())
    if truth is not None:
        same = F.one_hot(truth, 12).float()
        balanced = (same / same.sum(0).clamp_min(1)).sum(1) / (same.sum(0) > 0).sum()  # every key counts alike
        result["follows_offset"] = (a.mean(0) * balanced).sum().abs()
        result["follows_key"] = (a * torch.exp(2j * math.pi * 7 / 12 * truth)).mean().abs()
        away = (7 * (key_signature(a[2] + b[0], calibrate(model, waves.device)) - truth)) % 12  # in fifths
        result["exact"] = (away == 0).float().mean()
        result["fifth"] = ((away <= 1) | (away == 11)).float().mean()
    return {name: float(result.get(name, math.nan)) for name in MONITOR}


def verdict(m):
    """What a monitor's figures say, in words."""
    if m["follows_offset"] > 0.3 or m["fork"] < 0.5:
        return "SHORTCUT: y follows the crop offset, or stands still; it has not learned key"
    if m["fork"] < 0.9 or m["equivariance"] < 0.8:
        return "not there yet: y does not rotate reliably with the crop"
    key = f": label-free key signature {m['exact']:.2f} exact, {m['fifth']:.2f} within a fifth" if m["exact"] == m["exact"] else ""
    return "y rotates with the crop and is blind to its offset" + key


# ---------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------

def learning_rate(step, config):
    """Linear warm-up, then a cosine down to 5 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * min(1, (step + 1) / config.warmup) * (0.05 + 0.95 * cosine)


def weight_decay(step, config):
    """Cosine from 0.04 to 0.01, as published."""
    return 0.01 + 0.03 * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def autocast(device):
    """bf16 where the device multiplies it in hardware, float32 elsewhere."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def losses(model, batch, eq, g):
    """One step's views through the model: batch as Stream gives it, [B, 2, ...] -> {name: scalar loss}.

    A and B are two segments of a track, A' is A again; each view has its own EQ and crop offset. The contrastive
    token sees A and B with both branches; the equivariant token sees A, B and A' without mel. All views pass
    through the backbone as one batch."""
    c, B, dev = model.config, len(batch[0]), batch[0].device
    if c.encoder == "tune":
        with autocast(dev):
            z = model(batch[0].float().transpose(0, 1).flatten(0, 1))
        return {"nt_xent": nt_xent(*z.chunk(2), c.temperature)}
    frames = torch.randperm(FRAMES, generator=g)[:c.frames].sort().values.to(dev)
    views = [0, 1, 0] if "eq" in c.tasks else [0, 1]  # A, B, A'
    mel, vqt = (torch.cat([x[:, v][:, frames] for v in views]).float() for x in batch)  # [3B, F, 128], [3B, F, 99]
    eq_mel, eq_vqt = eq(len(mel), c.eq_db, g)
    offset = torch.randint(N_OFFSETS, (len(vqt),), generator=g).to(dev)
    mel, vqt = unit_range(mel + eq_mel.to(dev)), crop(unit_range(vqt + eq_vqt.to(dev)), offset)
    mel_on = None
    if model.hides_mel():
        mel_on = torch.zeros(len(mel), device=dev)
        if "con" in c.tasks:  # five views: con A, con B, eq A, eq B, eq A'
            mel, vqt = (torch.cat([x[:2 * B], x]) for x in (mel, vqt))
            mel_on = torch.cat([torch.ones(2 * B, device=dev), mel_on])
    with autocast(dev):
        tokens = model.encode(mel, vqt, mel_on, frames)
    cls = dict(zip(c.tasks, tokens.float().unbind(1)))
    terms = {}
    if "con" in cls:
        terms["nt_xent"] = nt_xent(*model.head_con(cls["con"][:2 * B]).chunk(2), c.temperature)
    if "eq" in cls:
        y_a, y_b, y_shift = model.center(model.logits(cls["eq"][-3 * B:]), offset).softmax(-1).chunk(3)
        c_a, c_b, c_shift = offset.chunk(3)  # a higher offset looks lower
        terms["cpsd"] = (cpsd(y_a, y_b, c_a - c_b) + cpsd(y_a, y_shift, c_a - c_shift)
                         + cpsd(y_b, y_shift, c_b - c_shift))
    return terms


def build(config):
    """The encoder that a config describes."""
    return TUNe(config) if config.encoder == "tune" else MT2(config)


def save(path, content):
    """torch.save that leaves either the old file or the new one, whenever the process or the machine dies."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot save ({str(error).splitlines()[0]}); the previous save is untouched") from None


def read(path):
    """A checkpoint's dict of plain data and tensors; nothing in the file can run (weights_only)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content, Config(**content["config"])
    except Exception as error:
        why = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{path}: cut, foreign or not a checkpoint of mt2 ({why})") from None


def load(path, device="cpu"):
    """Run folder or model.pt -> eval-mode model. FileNotFoundError or ValueError with a one-line reason."""
    path = Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train one with python mt2.py --out {path.parent}")
    content, config = read(path)
    model = build(config)
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: weights do not fit its config ({' '.join(str(error).split())[:100]})") from None
    return model.to(device).eval()


def resume(config, out):
    """-> the state that `out` holds of this very run, or None for a new run. Refuses anything else, touches nothing."""
    state = out / "state.pt"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    if not state.exists():
        if (out / "model.pt").exists():
            raise ValueError(f"--out {out}: holds model.pt but no state.pt to go on from; name another folder")
        return None
    content, theirs = read(state)
    for field in dataclasses.fields(Config):
        mine, other = getattr(config, field.name), getattr(theirs, field.name)
        if mine != other and field.name not in ("out", "device", "workers", "save_every"):
            raise ValueError(f"--out {out}: holds a run with {field.name} = {other}, not {mine}; name another folder")
    return content


def keep_log(path, header, last_step):
    """Open a CSV log for appending, cut back to rows up to `last_step`: no gap, no repeat, no half line."""
    lines = path.read_text().splitlines() if path.exists() else []
    full = [l for l in lines[1:] if l.count(",") == header.count(",") and l.split(",")[0].isdigit()]
    kept = [header] + [l for l in full if int(l.split(",")[0]) <= last_step]
    path.with_suffix(".tmp").write_text("\n".join(kept) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
    return open(path, "a", buffering=1)


def pick_device(name):
    """auto: cuda (this process's own, under torchrun), then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: choose auto, cpu, cuda or mps")
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: this machine has none; use --device auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def train(config):
    """Train as `config` says -> the run folder. The same call again goes on where the last one stopped."""
    # where: device, processes, run folder
    c, device, out = config, pick_device(config.device), Path(config.out)
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    state = resume(c, out)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = c.workers if c.workers >= 0 else max(1, cores // 2) if c.data else 0

    # what: model, optimiser (decay on matrices only), music
    torch.manual_seed(c.seed)
    model = build(c)
    if c.init:
        weights = load(c.init).state_dict()
        try:
            model.load_state_dict(weights)
        except RuntimeError:
            raise ValueError(f"--init {c.init}: that model has another shape; give the same size, tasks and inputs")
    model.to(device).train()
    decayed = [p for m in model.modules() for n, p in m.named_parameters(recurse=False)
               if n == "weight" and p.ndim >= 2]
    plain = [p for p in model.parameters() if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
                                  lr=c.lr, betas=(0.9, 0.98), fused=device.type != "mps")
    stream, eq = Stream(c, rank, "cpu" if workers else device), RandomEQ()
    done = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    if done >= c.steps:
        print(f"{out}: already trained for {done} steps; give more --steps with another --out")
        return out
    out.mkdir(parents=True, exist_ok=True)

    # the pool: chunks of fresh tracks in a ring; it starts with two batches
    slots, ahead = c.pool // c.fresh, min(c.pool // c.fresh, -(-2 * c.batch // c.fresh))
    chunk = max(0, done + ahead - slots)
    loader = iter(DataLoader(stream, batch_size=None, sampler=range(chunk, c.steps + ahead), num_workers=workers,
                             prefetch_factor=4 if workers else None))
    pool, skipped = None, {}

    # what the loss is at chance, and what it will cost
    if rank == 0:
        log = keep_log(out / "log.csv", "step,loss,nt_xent,cpsd,lr,tracks_per_s", done)
        watch = keep_log(out / "monitor.csv", "step,sound," + ",".join(MONITOR), done)
        seconds = 2 * SECONDS * c.batch * world_size()
        chance = ["nt_xent %.2f (1 of %d)" % (math.log(2 * c.batch * world_size() - 1), 2 * c.batch * world_size() - 1)]
        chance = chance * ("con" in c.tasks) + ["cpsd 3.00"] * ("eq" in c.tasks)
        print(f"{type(model).__name__} {'+'.join(c.tasks)}: {sum(p.numel() for p in model.parameters()):,} parameters on "
              f"{device} x {world_size()}; {seconds:.0f} s of sound a step; at chance {', '.join(chance)}; run folder {out}"
              + (f"; goes on after step {done}" if done else ""))
    heard, labels = SyntheticMusic(999).batch(192, 0)  # never trained on: training seeds start at 4096
    stop, bad, begin = [], 0, time.time()
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=c.steps, initial=done, unit="step", disable=rank > 0, dynamic_ncols=True, mininterval=0.5)
    for step in range(done, c.steps):
        # music: fresh tracks into the pool, a batch out of it
        while chunk < step + ahead:
            fresh, found = next(loader)
            if found.keys() - skipped.keys():
                skipped |= found
                first = "; ".join(f"{k}: {v}" for k, v in list(skipped.items())[:3])
                bar.write(f"skipped {len(skipped)} files so far ({first})")
            pool = pool or [torch.zeros(slots, *x.shape, dtype=x.dtype, device=device) for x in fresh]
            for ring, x in zip(pool, fresh):
                ring[chunk % slots] = x.to(device)
            chunk += 1
        g = torch.Generator().manual_seed(((c.seed + 1) * 4096 + rank) * 2 ** 32 + step)
        pick = torch.randperm(min(chunk, slots) * c.fresh, generator=g)[:c.batch].to(device)
        batch = [ring.flatten(0, 1)[pick] for ring in pool]

        # losses and gradients
        terms = losses(model, batch, eq, g)
        loss = terms.get("nt_xent", 0) + c.eq_weight * terms.get("cpsd", 0)
        optimizer.zero_grad()
        loss.backward()
        if world_size() > 1:  # one reduction: the mean gradient, and whether any process wants to stop
            flat = torch.cat([p.grad.flatten() for p in model.parameters()] + [loss.new_tensor([len(stop)])])
            dist.all_reduce(flat)
            for p, grad in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()] + [1])):
                p.grad.copy_(grad.view_as(p) / world_size())
            if flat[-1] > 0 and not stop:
                stop.append(signal.SIGTERM)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        # the update, unless something is not finite
        values = dict(zip(terms, torch.stack([*terms.values()]).tolist()))  # the step's one wait for the device
        if math.isfinite(sum(values.values())) and math.isfinite(norm.item()):
            bad = 0
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, c)
            optimizer.param_groups[0]["weight_decay"] = weight_decay(step, c)
            optimizer.step()
        else:
            bad += 1
            what = [k for k, v in values.items() if not math.isfinite(v)] or ["gradient"]
            bar.write(f"step {step + 1}: {', '.join(what)} not finite; update skipped ({bad} in a row)")
            if bad == 10:
                raise FloatingPointError(f"{out}: ten updates in a row were not finite; the last save is good: lower --lr")

        # log, save, watch for the shortcut
        last = step + 1 == c.steps
        if rank == 0:
            rate = (step + 1 - done) * c.batch * world_size() / (time.time() - begin)
            con, cps = values.get("nt_xent", math.nan), values.get("cpsd", math.nan)
            total = sum(w * v for w, v in ((1, con), (c.eq_weight, cps)) if v == v)
            log.write(f"{step + 1},{total:.6f},{con:.6f},{cps:.6f},{learning_rate(step, c):.6e},{rate:.1f}\n")
            bar.set_postfix(loss=f"{total:.3f}", **{k: f"{v:.3f}" for k, v in values.items()}, tracks_s=f"{rate:.0f}")
            bar.update()
            if stop or last or (step + 1) % c.save_every == 0:
                settings = dataclasses.asdict(c)
                save(out / "model.pt", {"config": settings, "model": model.state_dict()})
                save(out / "state.pt", {"config": settings, "model": model.state_dict(),
                                        "optimizer": optimizer.state_dict(), "step": step + 1})
            if "eq" in c.tasks and (last or (step + 1) % c.save_every == 0) and not stop:
                model.eval()
                with autocast(device):
                    m = monitor(model, heard.to(device), labels["key_signature"].to(device))
                model.train()
                watch.write(f"{step + 1},generated,{','.join(f'{m[k]:.4f}' for k in MONITOR)}\n")
                bar.write(f"step {step + 1}: {verdict(m)} (fork {m['fork']:.2f}, offset {m['follows_offset']:.2f})")
        if stop:
            break
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        print(f"{out}: stopped and saved after step {step + 1}; the same command goes on from there")
        raise SystemExit(128 + stop[0])
    return out


# ---------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------

def main():
    """One flag per Config field."""
    parser = argparse.ArgumentParser(description="Train MT2 (or --encoder tune) without labels; see README.md.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(Config):
        plain = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        kind = str if isinstance(plain, str) else field.type
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=plain, help=field.metadata["help"])
    try:
        out = train(Config(**vars(parser.parse_args())))
        print(f"done: {out}/model.pt; next: python probe.py {out}")
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"mt2: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
