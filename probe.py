"""probe.py: what a frozen model knows, task by task, readout by readout, layer by layer.

    python probe.py RUN...                                     # linear probes on generated music, no download
    python probe.py RUN --data manifest.csv --task key,chords  # on your own labelled music
    python probe.py --encoder muq:FOLDER                       # any other frozen encoder, the same code
    python probe.py key RUN FILE...                            # key signatures of songs; embed: features
    python probe.py figures RUN FILE                           # pictures of a song
    python probe.py ablation --steps 2400                      # two class tokens in one model, or two models?

A probe is one linear layer on standardised frozen features. Its score means something only above the
references in its table: log-mel statistics, VQT chroma, spectral flux and, for runs, the same network
untrained. The file reads from readouts to probes, tasks and metrics, data, the study, figures and commands.
"""
import argparse
import csv
import importlib
import json
import math
import os
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchaudio.functional import resample
from tqdm import tqdm

import mt2
from mt2 import HOP, SAMPLE_RATE, SAMPLES, SECONDS, need

READOUTS = ("eq", "con", "cls_avg", "seq_avg", "all_avg")  # of clips; of frames there is one more: "seq"
HOP_S = HOP / SAMPLE_RATE  # 32 ms
PITCHES = "C Db D Eb E F Gb G Ab A Bb B".split()
MINORS = "C C# D Eb E F F# G G# A Bb B".split()  # as minor keys are usually spelt
KEYS = [f"{p} major" for p in PITCHES] + [f"{p} minor" for p in MINORS]
progress = partial(tqdm, disable=None, leave=False)  # a bar on stderr, if that is a screen

# ---- Readouts. A "system" is a function: waves [B, T] -> {readout: [layers, B, D] or [layers, B, 126, D]}

def readouts(layers, class_tokens=(), edge=0):
    """Layers, each [B, n_cls + frames_l, dim_l] -> READOUTS [layers, B, dim] and "seq" [layers, B, 126, dim].
    Sequences are averaged or repeated to 126 frames; the first and last `edge`, of which nothing was heard,
    copy the nearest one. Narrow layers end in zeros. cls_avg needs two class tokens, all_avg one."""
    n, dim, found = len(class_tokens), max(x.shape[-1] for x in layers), []
    for x in layers:
        cls, seq = x[:, :n], x[:, n:]
        read = dict(zip(class_tokens, cls.unbind(1)))  # [B, dim_l] each, as are averages
        if n > 1:
            read["cls_avg"] = cls.mean(1)
        read["seq_avg"] = seq.mean(1)
        if n:
            read["all_avg"] = x.mean(1)
        frames = F.adaptive_avg_pool1d(seq.float().mT, mt2.FRAMES - 2 * edge)  # [B, dim_l, frames]
        read["seq"] = F.pad(frames, (edge, edge), mode="replicate").mT  # [B, 126, dim_l]
        found.append({name: F.pad(v.float(), (0, dim - x.shape[-1])) for name, v in read.items()})
    return {name: torch.stack([read[name] for read in found]) for name in found[0]}

def of_model(model, spectra):
    """A system out of a model of mt2.py; `spectra` is the front end that all systems of a table share."""
    if isinstance(model, mt2.TUNe):  # hears 59,049 of 64,000 samples: 5 frames less at each end
        return lambda wave: readouts(model.layers(wave), edge=5)
    del model.front_end  # torch lets no function, which `measure` shares among systems, replace a module
    model.front_end = spectra
    return lambda wave: readouts(model.layers(wave), model.class_tokens)

def attention(model, wave):
    """Attention paid to frames by class tokens and, "seq", by the mean frame: [blocks, B, heads, frames]."""
    n, passes = len(model.class_tokens), model.passes(wave)  # layer i of a pass is the input of block i
    maps = [block.attention(*block.project(x)[:2])[..., n:]  # [B, heads, N, frames]
            for layers in passes for block, x in zip(model.blocks, layers)]
    maps = torch.stack(maps).unflatten(0, (len(passes), -1))  # [passes, blocks, B, heads, N, frames]
    # eq reads the first pass, without mel, con the last, as in MT2.layers
    paid = {name: maps[0 if name == "eq" else -1, ..., i, :] for i, name in enumerate(model.class_tokens)}
    return paid | {"seq": maps.mean(0)[..., n:, :].mean(3)}

def of_attention(model):
    """Onsets from attention: how much it rises at a frame, {name: [blocks x heads, B, frames, 1]}."""
    rise = lambda x: F.pad(x.diff(dim=-1).clamp_min(0), (1, 0)).transpose(1, 2).flatten(0, 1)[..., None]
    return lambda wave: {name: rise(x) for name, x in attention(model, wave).items()}

def of_spectrum(name, spectra):
    """References. log-mel, chroma: of a clip mean and std over time, of frame t frames t - 2, t, t + 2.
    flux: spectral flux, the mean rise of the mel bands in dB, as an onset curve."""
    def read(wave):
        mel, vqt = spectra(wave)  # dB [B, 126, 128] and [B, 126, 99]
        if name == "flux":
            return {"curve": F.pad(mel.diff(dim=1).clamp_min(0).mean(2), (1, 0))[None, ..., None]}
        chroma = (10 ** (vqt[..., :84] / 20)).unflatten(2, (7, 12)).sum(2)  # [B, frames, 12], A first
        chroma = chroma / chroma.amax((1, 2), keepdim=True)  # without the clip's loudness
        x = chroma if name == "chroma" else mt2.unit_range(mel)  # [B, 126, bins]
        near = F.pad(x.mT, (2, 2), mode="replicate").mT.unfold(1, 5, 1)  # [B, 126, bins, 5]: t - 2 to t + 2
        near = near[..., ::2].flatten(2)  # [B, 126, 3 bins]
        return {"mean+std": torch.cat([x.mean(1), x.std(1)], -1)[None], "seq": near[None]}
    return read

def of_package(spec, device, download=False, trust=False):
    """A system out of muq:FOLDER, mert:FOLDER, musicfm:FOLDER or module:callable, which takes waves [B, T] at
    its own `.rate`, else 16 kHz, and gives a list of [B, frames, dim]. ValueError if it does not load or
    fails; it is tried on four seconds of silence at once."""
    kind, _, where = spec.partition(":")
    # with transformers 5 MERT and MusicFM give no hidden states (tried with their own code)
    known = dict(muq="pip install muq 'transformers<5'; FOLDER holds config and weights",
                 mert="pip install 'transformers<5'; FOLDER holds config, weights, code; --trust-remote-code",
                 musicfm="github.com/minzwon/musicfm on PYTHONPATH; pip install einops 'transformers<5'; "
                         "FOLDER holds stats and weights; --download once, for a config it asks for by name")
    if kind in known and not download:
        need(Path(where).is_dir(), f"--encoder {spec}: no such folder; or add --download to fetch it by name")
        os.environ["HF_HUB_OFFLINE"] = "1"  # a local folder never asks the network

    @contextmanager
    def one_line():
        try:
            yield
        except Exception as error:  # foreign code raises anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            wants = known.get(kind, "module:callable on PYTHONPATH that gives a list of [B, frames, dim]")
            raise ValueError(f"--encoder {spec}: {reason}; it needs {wants}") from None
    with one_line():
        rate = 24000
        if kind == "muq":
            from muq import MuQ
            model = MuQ.from_pretrained(where).to(device).eval()
            layers = lambda wave: model(wave, output_hidden_states=True).hidden_states
        elif kind == "mert":
            from transformers import AutoModel, Wav2Vec2FeatureExtractor
            model = AutoModel.from_pretrained(where, trust_remote_code=trust).to(device).eval()
            scale = Wav2Vec2FeatureExtractor.from_pretrained(where)
            rate = scale.sampling_rate

            def layers(wave):
                scaled = np.stack(scale([*wave.cpu().numpy()], sampling_rate=rate)["input_values"])
                return model(torch.as_tensor(scaled).to(wave), output_hidden_states=True).hidden_states
        elif kind == "musicfm":
            from musicfm.model.musicfm_25hz import MusicFM25Hz
            stats, weights = (str(min(Path(where).glob(name))) for name in ("*stats*.json", "*.pt"))
            model = MusicFM25Hz(is_flash=False, stat_path=stats, model_path=weights).to(device).eval()
            layers = lambda wave: model.get_predictions(wave)[1]  # the hidden states, not the logits
        else:
            layers = getattr(importlib.import_module(kind), where)
            rate = getattr(layers, "rate", SAMPLE_RATE)
            if isinstance(layers, torch.nn.Module):
                layers.to(device).eval()

    def read(wave):
        with one_line():
            found = [*layers(resample(wave.clone(), SAMPLE_RATE, rate))]  # it may work in place
            good = found and all(x.ndim == 3 and len(x) == len(wave) for x in found)
            need(good, "a layer is not [B, frames, dim], or there is none")
            return readouts(found)
    with torch.no_grad():
        for n in (1, 2):
            read(torch.zeros(n, SAMPLES, device=device))  # what does not fit is known before all music
    return read

# ---- Probes: one linear layer for each layer x readout x strength of weight decay, all in one computation
L2 = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MAX_ROWS = 8000  # windows or frames that a probe trains or validates on; a mixture of layers: a quarter

def activate(logits, multi):
    """Logits [..., C] -> probabilities: of independent tags if `multi`, else of exclusive classes."""
    return logits.sigmoid() if multi else logits.softmax(-1)

def cross_entropy(logits, y, multi):
    """Logits [..., N, C] and targets [N, C] -> mean over the rows (and over the tags) [...]."""
    loss = (F.softplus(logits) - y * logits).mean(-1) if multi else -(y * logits.log_softmax(-1)).sum(-1)
    return loss.mean(-1)

def fit(x, y, multi, l2=L2, steps=40):
    """Features x [G, N, D], targets y [N, C] -> weights [G, K, D + 1, C], bias last, for strengths l2 [K].
    Full-batch logistic regression without learning rate or random start. Boehning's bound: the Hessian is at
    most a quarter (tags) or half (classes) of X^T X / N, so a step by the bound's inverse never overshoots
    (but for rounding: weak decay, nearly equal features). With Nesterov's momentum 40 steps suffice."""
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)  # the bias is one more weight
    (G, N, D), K, C = x.shape, len(l2), y.shape[1]  # D counts the bias now; K decays, C classes
    decay = torch.tensor(l2, device=x.device)[:, None].repeat(1, D)  # [K, D]
    decay[:, -1] = 1e-6  # the bias is free
    bound = (0.25 if multi else 0.5) * (x.mT @ x / N)[:, None] + torch.diag_embed(decay)  # [G, K, D, D]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(bound))  # [G, K, D, D], once for all steps
    w = ahead = x.new_zeros(G, K, D, C)  # ahead: where momentum carries w next
    for step in range(steps):
        logits = (x @ ahead.transpose(1, 2).flatten(2)).unflatten(2, (K, C))  # [G, N, K, C]
        error = (activate(logits, multi) - y[:, None]).flatten(2)  # [G, N, K C]
        grad = (x.mT @ error / N).unflatten(2, (K, C)).transpose(1, 2) + decay[..., None] * ahead
        last, w = w, ahead - inverse @ grad  # down to the minimum of the bound
        ahead = w + step / (step + 3) * (w - last)
    return w

def fit_mixture(x, y, multi):
    """Features x [G, N, D], targets y [N, C] -> shares of the layers in a mixture [G, 1, 1], and weights
    [D, C] and bias [C] of a probe that reads it, all learned together."""
    (G, N, D), C = x.shape, y.shape[1]
    score, w, b = params = [x.new_zeros(shape).requires_grad_() for shape in ((G, 1, 1), (D, C), (C,))]
    # 20 iterations: from then on the shares fit noise until one layer takes all, and scores fall
    optimizer = torch.optim.LBFGS(params, max_iter=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = (score.softmax(0) * x).sum(0) @ w + b  # [N, C]
        decay = 0.01 / C if multi else 0.01  # a mean over the tags, which `fit` adds up
        loss = cross_entropy(logits, y, multi) + decay / 2 * w.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return score.softmax(0).detach(), w.detach(), b.detach()

def probe(x, y, held_x, held_y, multi, mix=False):
    """Train on x [G, N, D], y [N, C]; x's mean and std scale all. Held-out rows choose each probe's decay
    -> predict (features [G, M, D] -> logits [G, M, C]), held-out losses [G], None.
    mix: one probe of a learned mixture -> predict (-> [1, M, C]), loss [1], shares of the G layers [G]."""
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)  # [G, 1, D]
    # a feature becomes 0 if its spread is mere rounding, of its own mean or of its layer's widest feature
    std = torch.where(std > (1e-6 * mean.abs()).maximum(1e-7 * std.amax(2, keepdim=True)), std, torch.inf)
    scaled = lambda x: (x - mean) / std
    if mix:
        share, w, b = fit_mixture(scaled(x), y, multi)
        predict = lambda x: ((share * scaled(x)).sum(0) @ w + b)[None]  # [1, M, C]
        return predict, cross_entropy(predict(held_x), held_y, multi), share.flatten()
    w = fit(scaled(x), y, multi)
    logits = scaled(held_x)[:, None] @ w[:, :, :-1] + w[:, :, -1:]  # [G, K, M, C], K decays
    loss, best = cross_entropy(logits, held_y, multi).nan_to_num(math.inf, math.inf).min(1)  # [G] each
    w = w[torch.arange(len(w)), best]  # [G, D + 1, C]
    return lambda x: scaled(x) @ w[:, :-1] + w[:, -1:], loss, None

# ---- Tasks: targets for the probe and a metric for what it says, mir_eval's where it has one
KINDS = dict(key="key", tempo="tempo", bpm="tempo", chord="chord", chords="chord", beat="beat", beats="beat",
             onset="onset", onsets="onset", tags="tags")  # by a column's name; any other: classes, or tags

class Task(NamedTuple):
    """What to predict, and how well it was done."""
    name: str            # as results and messages have it
    y: torch.Tensor      # targets [windows, C] or, per frame, [windows, frames, C]; NaN without label
    owner: torch.Tensor  # [windows] the file of each
    score: Callable      # (probabilities like y, test files, validation files) -> {metric: value}
    multi: bool = False  # C independent tags, not exclusive classes

def ranking(truth, scores):
    """Truth of 0 and 1, scores [N, C] -> average precision and area under the ROC curve, means over the
    columns that hold both positives and negatives. Ties rank together, and count half."""
    ap, auc = [], []
    for t, s in zip(truth.T > 0, scores.T):
        if 0 < t.sum() < len(t):
            yes, no = s[t, None], s[~t]  # scores of positives, as a column, and of negatives
            hits, misses = (yes <= s[t]).sum(1), (yes <= no).sum(1)  # for each positive: as high or higher
            ap.append((hits / (hits + misses)).mean())
            auc.append(((yes > no).mean() + (yes >= no).mean()) / 2)
    return {"map": np.mean(ap or math.nan), "roc_auc": np.mean(auc or math.nan)}  # NaN without any

def tempo_accuracy(truth, estimate):
    """True BPM [N], estimates -> Acc1, within 4 %; Acc2, where 1/3, 1/2, 2 and 3 times it count as well."""
    near = [np.abs(estimate / (truth * factor) - 1) <= 0.04 for factor in (1, 2, 3, 1 / 2, 1 / 3)]
    return {"acc1": near[0].mean(), "acc2": np.any(near, 0).mean()}

def chord_class(label):
    """Chord label (Harte) -> root, + 12 if minor, 24 for N, -1 for others. InvalidChordException."""
    import mir_eval  # where it is used, as soundfile: the benchmark does without them
    root, notes, _ = mir_eval.chord.encode(label)
    triad = "".join(str(int(note)) for note in notes[:8])  # semitones from the root to the fifth
    return {"10001001": root, "10010001": 12 + root}.get(triad, 24 if label == "N" else -1)

def clip_task(name, truth, owner):
    """Truth: per file a set of one class, KEYS index or BPM, or of tags; or None. owner: files of windows."""
    from mir_eval.key import weighted_score
    kind, labels = KINDS.get(name), truth
    tags = kind == "tags" or any(len(v) != 1 for v in truth if v is not None)
    classes = range(24) if kind == "key" else sorted(set().union(*filter(None, truth)))  # those that occur
    if kind == "tempo":  # 5 % apart: the nearest lies within 2.5 %
        classes = [classes[0] * 1.05 ** i for i in range(2 + int(math.log(classes[-1] / classes[0], 1.05)))]
        labels = [v and {min(classes, key=lambda c: abs(c - bpm)) for bpm in v} for v in truth]
    y = torch.tensor([[math.nan if v is None else float(c in v) for c in classes] for v in labels])

    def score(p, test, valid):
        p = torch.zeros_like(y).index_add(0, owner, p) / owner.bincount(minlength=len(y))[:, None]  # per file
        right, said = y[test].numpy(), p[test].numpy()  # [files, C]
        if tags:
            return ranking(right, said)
        right, said = right.argmax(1), said.argmax(1)
        if kind == "tempo":
            return tempo_accuracy(np.array([bpm for i in test for bpm in truth[i]]), np.array(classes)[said])
        scores = {"accuracy": (right == said).mean()}
        if kind == "key":
            scores["mirex"] = np.mean([weighted_score(KEYS[a], KEYS[b]) for a, b in zip(right, said)])
        return scores
    return Task(name, y[owner], owner, score, tags)

def chord_task(name, truth, owner, now):
    """Truth: (intervals [n, 2] in s, classes [n]) per file; owner, now: files of windows, times of frames.
    mir_eval's majmin, frame by frame: the share of right ones where the label is major, minor or N."""
    index = torch.full(now.shape, -1)  # [windows, frames]; -1: no label, not scored
    for row, time, file in zip(index.numpy(), now.numpy(), owner.tolist()):  # a row is a view of index
        intervals, classes = truth[file] or ((), ())
        for (begin, end), chord in zip(np.float32(intervals), classes):  # as precise as `now`
            row[(begin <= time) & (time < end)] = chord
    y = F.one_hot(index.clamp_min(0), 25).float().masked_fill(index[..., None] < 0, math.nan)

    def score(p, test, valid):
        known = torch.isin(owner, test)[:, None] & (index >= 0)  # [windows, frames]
        return {"majmin": (p.argmax(-1) == index)[known].float().mean().item()}  # all frames count alike
    return Task(name, y, owner, score)

def peaks(curve):
    """Where curves [n, frames] are above 0 and highest within two frames on either side."""
    return (curve > 0) & (curve == F.max_pool1d(curve[:, None], 5, 1, 2)[:, 0])

def event_task(name, truth, owner, now):
    """Truth: times [n] in s per file. F-measure per file, beats within 70 ms, onsets within 50 ms."""
    from mir_eval.onset import f_measure
    window = 0.07 if KINDS.get(name) == "beat" else 0.05  # s; but for it mir_eval.beat.f_measure is the same
    y = torch.full((*now.shape, 1), math.nan)  # 1 where a frame holds an event, else 0; NaN without labels
    for i, file in enumerate(owner.tolist()):
        if truth[file] is not None:
            frame = np.round((truth[file] - now[i, 0].item()) / HOP_S)  # may lie in another window
            y[i, :, 0] = torch.from_numpy(np.isin(range(now.shape[1]), frame))

    def score(p, test, valid):
        p = p[:, :-1, 0]  # the last frame of a window is the first of the next
        peak, held, values = peaks(p), torch.isin(owner, valid), []  # held: windows of validation files
        # one threshold for all: the n-th highest peak of validation files, which hold n (at least 1) events
        heights, count = p[held][peak[held]].sort(descending=True).values, int(y[held, :-1].sum())
        least = F.pad(heights, (0, 1))[:max(count, 1)][-1]  # 0 if there are fewer peaks
        said = peak & (p >= least)  # [windows, frames]
        for file in test.tolist():
            mine = owner == file
            true = truth[file][truth[file] < now[mine].max().item()]  # of a long file only the start is read
            if len(true):  # F is not defined where nothing happens
                guess = now[mine, :-1][said[mine]].numpy()
                values.append(f_measure(true, guess, window)[0] if len(guess) else 0)  # of none it would warn
        return {"f_measure": np.mean(values or math.nan)}
    return Task(name, y, owner, score, multi=True)

FRAME_TASKS = dict(chord=chord_task, beat=event_task, onset=event_task)

# ---- Data: generated music, sound files, manifests
COUNTS, LOCAL, CHUNK = (800, 200, 400), (200, 100, 150), 50  # train, valid, test clips; with frames; a batch
LIMIT = 120.0  # seconds that are read of a file

def generated(truth):
    """Batches for `collect`; fills `truth`, a defaultdict {task: labels, one per clip}, on the way."""
    names = list(mt2.INSTRUMENTS)
    start = (np.arange(mt2.FRAMES) - 0.5) * HOP_S  # half a frame early, so a frame lies amid its span
    spans = np.stack([start, start + HOP_S], 1)  # a chord per frame, as read from a .lab file
    for part, (clips, local) in enumerate(zip(torch.arange(sum(COUNTS)).split(COUNTS), LOCAL)):
        music = mt2.SyntheticMusic(1001 + part)  # training has seeds from 4096, calibration 998, monitor 999
        for step, files in enumerate(clips.split(CHUNK)):  # a clip stands for a file
            waves, labels = music.batch(CHUNK, step)  # half of the tracks rich, half easy
            for task in ("key", "key_signature", "instrument", "tempo"):
                truth[task] += [{label} for label in labels[task].tolist()]
            # as in MagnaTagATune, tags for both class tokens: key signature (eq) and lead instrument (con)
            both = zip(labels["key_signature"].tolist(), labels["instrument"].tolist())
            truth["tags"] += [{PITCHES[key], names[i]} for key, i in both]
            truth["chord"] += [(spans, chord) for chord in labels["chord"][:, 0].tolist()]
            for task in ("beat", "onset"):  # NaN is dropped
                truth[task] += [np.sort(times[times >= 0]) for times in labels[f"{task}s"][:, 0].numpy()]
            yield waves[:, 0], files, torch.zeros(CHUNK), step * CHUNK < local  # only segment A

def cut(path):
    """Sound file -> mono 16 kHz windows [n, 64000], one after another; a rest is padded or, if no longer
    than a quarter of a window, dropped, unless it is all there is. ValueError."""
    import soundfile
    need(os.path.isfile(path), f"{path}: no such file; name sound files, not folders")
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # a name need not be valid text
            rate = 25 * round(file.samplerate / 25)  # as in mt2.AudioFolder
            length = min(file.frames, int(LIMIT * file.samplerate))
            wave = file.read(length, dtype="float32", always_2d=True).mean(1)
    except (RuntimeError, TypeError):  # TypeError: .raw, which has no header
        what = "not a sound file, broken or not permitted; give whole wav, flac, ogg or mp3"
        raise ValueError(f"{path}: {what}") from None
    # from 80 dB below full scale to 120 above; NaN fails any comparison
    good = 1000 <= rate <= 10 ** 6 and len(wave) and 1e-4 <= np.abs(wave).max() < 1e6
    need(good, f"{path}: holds no sound, or NaN, infinity, a level or a rate beyond all sound; remove it")
    if len(wave) < length - rate:  # a note, no error: without a table of contents an mp3's length is a guess
        tqdm.write(f"{path}: read {len(wave) / rate:.0f} of {length / rate:.0f} s; cut?", file=sys.stderr)
    wave = resample(torch.from_numpy(wave), rate, SAMPLE_RATE)
    if len(wave) < SAMPLES:
        tqdm.write(f"{path}: shorter than {SECONDS:g} s, padded with silence", file=sys.stderr)
    count = max(1, math.ceil((len(wave) - SAMPLES // 4) / SAMPLES))
    return F.pad(wave, (0, SAMPLES))[:count * SAMPLES].view(count, SAMPLES)

def read_files(files, frames=True):
    """Batches for `collect`, one for each sound file that can be read; the others are named on stderr."""
    for i, file in enumerate(files):
        try:
            waves = cut(file)
        except ValueError as error:
            tqdm.write(f"probe: {error}", file=sys.stderr)
            continue
        yield waves, torch.full((len(waves),), i), SECONDS * torch.arange(len(waves)), frames

def none_lost(found, files):
    """After all work: ValueError, and so an exit status, if only `found` of the files could be read."""
    need(found == len(files), f"{len(files) - found} of {len(files)} files were left out: see above")

def read_labels(path, kind, sound):
    """Label file -> times [n] in s of events; of chords (intervals [n, 2] in s, classes [n]). ValueError."""
    import soundfile
    from mir_eval.chord import InvalidChordException
    need(os.path.isfile(path), f"{path}: no such label file; fix the column")
    try:
        rows = [line.split() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        times = np.array([row[:2 if kind == "chord" else 1] for row in rows], float)
        chords = [chord_class(label) for _, _, label in rows] if kind == "chord" else []
        rising = rows and times.min() >= 0 and (np.diff(times.flatten()) > -1e-3).all()  # slack: rounding
        need(rising, "no times that rise from 0 on")
    except (ValueError, InvalidChordException) as error:
        line = "two rising times in seconds, a chord like A:min" if kind == "chord" else "a time in seconds"
        raise ValueError(f"{path}: empty or not labels ({error}); a line holds {line}") from None
    last, seconds = times.max(), math.inf  # inf: a broken sound, which `cut` will name
    with suppress(RuntimeError, TypeError):
        seconds = soundfile.info(os.fsencode(sound)).duration
    # half a second of grace: the last label is often rounded up
    need(last < seconds + 0.5, f"{path}: a label at {last:.2f} s, but the sound ends at {seconds:.2f} s")
    return (times, chords) if chords else np.sort(times[:, 0])

def parse(kind, text, folder, sound):
    """Kind and text of a cell, its sound file -> the file's truth, as tasks take it. ValueError."""
    from mir_eval.key import KEY_TO_SEMITONE
    if kind == "key":
        tonic, _, mode = text.replace(":", " ").lower().partition(" ")  # as in C:maj, f# minor
        tonics = KEY_TO_SEMITONE | {"cb": 11, "fb": 4, "e#": 5, "b#": 0}  # mir_eval lacks these
        root, minor = tonics.get(tonic), {"maj": 0, "major": 0, "min": 12, "minor": 12}.get(mode.strip())
        need(None not in (root, minor), f"'{text}' is no key like C major or F# minor")
        return {root + minor}
    if kind == "tempo":
        bpm = float(text)  # ValueError if it is none
        need(10 <= bpm <= 1000, f"'{text}' is not 10 to 1000 beats per minute")
        return {bpm}
    if kind in FRAME_TASKS:
        return read_labels(folder / text, kind, sound)
    return {tag.strip() for tag in text.split("|") if tag.strip()}  # a class is a single tag

def manifest(path, tasks, seed=0, for_probe=True):
    """-> files, {task: truth per file}, {task: (train, valid, test) file numbers}. ValueError or OSError for
    what is wrong with it, before anything is computed; for_probe: also for what no probe can be fit on."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            columns = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--data {path}: {error}; give a CSV text file, see README.md") from None
    folder, truth, parts = Path(path).parent, {}, {}
    for name in ("path", *tasks):
        need(columns.count(name) == 1, f"{path}: must have one column '{name}'; has: {', '.join(columns)}")
    surplus = any(any(row.get(None, ())) for row in rows)  # cells beyond the header's, but for empty ones
    need(not surplus, f"{path}: a row has more cells than the header; quote commas")
    need(columns.count("split") < 2, f"{path}: must have at most one column 'split'")
    rows = [row for row in rows if any(row[task].strip() for task in tasks)]  # with at least one label
    files = [folder / row["path"] for row in rows]
    lost = [str(file) for file in files if not os.path.isfile(file)]
    need(not lost, f"{path}: {len(lost)} of {len(files)} files are missing, as {lost[:1]}; fix column 'path'")
    twice = [name for name, n in Counter(str(file.resolve()) for file in files).items() if n > 1]
    need(not twice, f"{path}: {twice[:1]} is listed twice; give each file one row")
    rank = np.random.default_rng(seed).permutation(len(rows))  # no split: a random fifth is for testing
    split = [row.get("split", "test" if i < len(rows) / 5 else "train").strip() for i, row in zip(rank, rows)]
    wrong = sorted(set(split) - {"train", "valid", "test"})
    need(not (for_probe and wrong), f"{path}: split {wrong[:1]} is not train, valid or test")
    for task in tasks:
        cells = [row[task].strip() for row in rows]
        kind = KINDS.get(task, "tags")
        try:
            truth[task] = [parse(kind, cell, folder, file) if cell else None
                           for cell, file in zip(cells, files)]
        except ValueError as error:
            raise ValueError(f"{path}, column '{task}': {error}") from None
        parts[task] = [torch.tensor([i for i, cell in enumerate(cells) if cell and split[i] == part]).long()
                       for part in ("train", "valid", "test")]
        if not for_probe:
            continue
        train, _, test = parts[task]
        few = f"{len(train)} labels in train and {len(test)} in test; it needs 2 and 1"
        need(len(train) > 1 and len(test), f"{path}: column '{task}' has {few}")
        if kind not in FRAME_TASKS:
            known, asked = (set().union(*(truth[task][i] for i in part)) for part in (train, test))
            new = sorted(asked - known) if kind == "tags" else []
            need(len(known) > 1, f"{path}: column '{task}' has one class only in train; a probe needs two")
            need(not new, f"{path}, column '{task}': {new[:1]} in test, not in train; drop it or split anew")
    return files, truth, parts

# ---- The study: every system, task, readout and layer

@torch.no_grad()
def collect(systems, batches, device):
    """Run all systems over batches: waves [B, T], files [B], starts [B] in s, whether to keep frames
    -> features {system: {readout: [layers, N, D] or, of the n windows with frames, [layers, n, 126, D]}},
    and of all N windows the file [N], the times of frames in s [N, 126], whether frames were kept [N]."""
    found, windows = {name: defaultdict(list) for name in systems}, []
    for waves, files, start, frames in batches:
        waves, now = waves.to(device), start[:, None] + torch.arange(mt2.FRAMES) * HOP_S
        windows.append((files, now, torch.full((len(files),), frames)))
        for (name, seeds), read in systems.items():
            if not frames and name.endswith(" attention"):  # it has frames only
                continue
            for readout, x in read(waves).items():
                if frames or x.ndim == 3:
                    need(x.isfinite().all(), f"{name}, {readout}: NaN or infinity")
                    if x.ndim == 4:  # frames are many: halves, if none errs by over a tenth of a std
                        half = x.half()  # compared layer by layer: the whole would take much memory
                        near = (((h - v).abs() <= 0.1 * v.std((0, 1))).all() for h, v in zip(half, x))
                        x = half if all(near) else x
                    found[name, seeds][readout].append(x.cpu())
    need(windows, "no sound could be read")
    found = {name: {r: torch.cat(x, 1) for r, x in features.items()} for name, features in found.items()}
    return found, *map(torch.cat, zip(*windows))

def evaluate(x, task, part, device, mix=False):
    """Features x [G, windows, D] or [G, windows, frames, D] -> G scores {metric: value}, G held-out losses;
    of a mixture one of each, and its weights. ValueError."""
    train, valid, test = part  # file numbers
    if x.ndim == 4 and x.shape[-1] == 1:  # width 1: an onset curve, scored without a probe
        held = [-task.score(p, valid, valid)["f_measure"] for p in x.float()]  # score as loss
        return [task.score(p, test, valid) for p in x.float()], held, None
    # windows, or all their frames, become rows: y [rows, C], flat [G, rows, D], the file of each row
    y, flat = task.y.flatten(0, -2), x.flatten(1, -2)
    owner, data = task.owner.repeat_interleave(len(y) // len(task.owner)), []
    for files, least in ((train, 2), (valid, 1)):
        rows = (torch.isin(owner, files) & y.isfinite().all(-1)).nonzero()[:, 0]  # with a label
        need(len(rows) >= least, f"column '{task.name}': too little labelled sound; label more files")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[order[:MAX_ROWS // (4 if mix else 1)]]
        data += [flat[:, rows].to(device).float(), y[rows].to(device)]  # frames may be halves
    predict, loss, weights = probe(*data, task.multi, mix)
    # [G, rows, C], in parts: frames of all layers at once would fill the memory
    logits = torch.cat([predict(v.to(device).float()).cpu() for v in flat.split(2 ** 14, dim=1)], dim=1)
    p = activate(logits, task.multi).unflatten(1, task.y.shape[:-1])  # [G, windows(, frames), C]
    return [task.score(q, test, valid) for q in p], loss.tolist(), weights

def study(found, tasks, parts, device, mix):
    """-> rows for results.json. Each seed leaves out another tenth of the training files or, where there is
    no validation part, validates on another fifth of them."""
    runs = defaultdict(list)  # (system, task, readout, layer): scores and held-out loss of each seed
    jobs = [(name, task, *item) for name, task in tasks.items() for item in found.items()]
    for name, task, (system, seeds), features in progress(jobs, "probes"):
        wanted = {r: x for r, x in features.items()  # of clips or frames, as the task; width 1: events only
                  if x.ndim == task.y.ndim + 1 and (x.ndim == 3 or x.shape[-1] > 1 or task.multi)}
        for seed in seeds if wanted else ():
            train, valid, test = parts[name]
            train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
            few = math.ceil(len(train) / (10 if len(valid) else 5))  # to leave out, or to validate on
            part = train[few:], valid if len(valid) else train[:few], test
            # all readouts and layers side by side: [G, windows, D] or [G, windows, frames, D]
            scores, losses, _ = evaluate(torch.cat([*wanted.values()]), task, part, device)
            places = [(r, layer) for r, x in wanted.items() for layer in range(len(x))]  # in the same order
            for r, x in wanted.items():
                if mix and len(x) > 1 and x.shape[-1] > 1:  # several layers, no curve
                    score, loss, weights = evaluate(x, task, part, device, mix=True)
                    scores, losses, places = scores + score, losses + loss, places + [(f"{r} mix", 0)]
                    print(f"layers of {system} {r} for {name}:", *(f"{w:.2f}" for w in weights))
            for place, *result in zip(places, scores, losses):
                runs[(system, name) + place].append(result)  # [scores, loss]
    rows, number = [], lambda v: round(float(v), 5) if math.isfinite(v) else None  # no NaN in JSON
    for (system, name, readout, layer), of_seeds in runs.items():
        scores, losses = zip(*of_seeds)
        for metric in scores[0]:
            values = [score[metric] for score in scores]
            rows.append(dict(encoder=system, task=name, readout=readout, layer=layer, metric=metric,
                             value=number(np.mean(values)), std=number(np.std(values)),
                             n_train=len(parts[name][0]), n_test=len(parts[name][2]),
                             valid_loss=number(np.mean(losses))))
    return rows

def grouped(results, *keys):
    """{values of keys: their rows} of main metrics that have a value; a loss of None becomes infinite."""
    rows = defaultdict(list)
    for row in results:
        if row["metric"] in ("accuracy", "acc1", "map", "majmin", "f_measure") and row["value"] is not None:
            loss = math.inf if row["valid_loss"] is None else row["valid_loss"]
            rows[tuple(row[key] for key in keys)].append(row | {"valid_loss": loss})
    return rows

def table(results):
    """Print scores at the layer of the lowest validation loss and at the last; ±: the std over seeds."""
    cells = {row["encoder"]: defaultdict(dict) for row in results}  # {system: {readout: {task: text}}}
    metrics = {}  # {task: its main metric}
    for (system, task, readout), layers in grouped(results, "encoder", "task", "readout").items():
        metrics[task] = layers[0]["metric"]
        shown = {readout: min(layers, key=lambda row: row["valid_loss"])}
        if len(layers) > 1:
            shown[f"{readout} last"] = layers[-1]
        for name, row in shown.items():
            layer = f" L{row['layer']}" if len(layers) > 1 else ""
            cells[system][name][task] = f"{row['value']:.3f}±{row['std']:.3f}{layer}"
    grid = [("", "", *metrics), ("system", "readout", *metrics.values())]
    grid += [(system, readout, *(line.get(task, "") for task in metrics))
             for system, lines in cells.items() for readout, line in lines.items()]
    widths = [max(map(len, column)) for column in zip(*grid)]
    print("\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in grid))

# ---- Figures: PNG, colour-blind safe (Okabe-Ito; cividis); without pyplot they need no screen
COLOURS = dict(zip((*READOUTS, "seq"), ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")))
REFERENCES = ("untrained", "log-mel", "chroma", "flux")  # and names that end in " attention"

def ready(folder):
    """Make a folder for results, before the work; OSError if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from None

def write(path, save):
    """Whatever save(open file) writes -> file, whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"  # its own: two probes may write to one place
    try:
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)  # whoever reads meanwhile sees the old file or the new one
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({mt2.brief(error)})") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    print(path)

def draw(path, figure):
    """Figure -> PNG, whatever the user's matplotlibrc says."""
    write(path, partial(figure.savefig, format="png", dpi=110))

def layers_figure(results):
    """Scores over layers, a panel per task, a line per readout; horizontal: a reference at its best layer."""
    rows, handles = grouped(results, "encoder", "task"), {}
    tasks = list(dict.fromkeys(row["task"] for row in results))
    systems = list(dict.fromkeys(system for system, _ in rows))
    references = [s for s in systems if s in REFERENCES or s.endswith(" attention")]
    width, height = min(3, len(tasks) + 1), math.ceil((len(tasks) + 1) / 3)  # one more for the legend
    figure = Figure((3.2 * width, 2.7 * height), layout="constrained")
    panels = {task: figure.add_subplot(height, width, 1 + i) for i, task in enumerate(tasks)}
    for (system, task), mine in rows.items():
        ax = panels[task]
        ax.set(title=task, xlabel="layer", ylabel=mine[0]["metric"].replace("_", " "))
        ax.locator_params(axis="x", integer=True)
        if system in references:
            i, best = references.index(system), min(mine, key=lambda row: row["valid_loss"])
            style = dict(ls=("--", "-.", ":")[i % 3], color=("k", "0.6")[i // 3 % 2], lw=1.2)
            handles[system] = ax.axhline(best["value"], **style)
            continue
        for r in COLOURS:
            points = [(row["layer"], row["value"]) for row in mine if row["readout"] == r]
            if points:
                style = dict(marker="osD^v"[systems.index(system) % 5], ms=4, lw=1.2, color=COLOURS[r])
                style["ls"] = "--" if r == "all_avg" else "-"  # it often lies on seq_avg
                handles[f"{system} {r}"], = ax.plot(*zip(*points), **style)
    ax = figure.add_subplot(height, width, 1 + len(tasks))
    ax.axis("off")
    ax.legend(handles.values(), map(mt2.printable, handles), loc="center", fontsize=7, frameon=False)
    return figure

def similarity_figure(model, waves):
    """Cosine similarity of centred sequence tokens, 6 a second, of windows [n, 64000], a matrix per layer."""
    # centred: all tokens share a large mean, beside which everything would look alike
    seq = readouts(model.layers(waves), model.class_tokens)["seq"][:, :, :125].unflatten(2, (25, 5)).mean(3)
    seq = seq.flatten(1, 2)  # [layers, 25 n, dim]
    seq = F.normalize(seq - seq.mean(1, keepdim=True), dim=-1).cpu().numpy()
    width, height, end = min(5, len(seq)), math.ceil(len(seq) / 5), SECONDS * len(waves)
    figure = Figure((2.8 * width + 1, 2.8 * height + 0.8), layout="constrained")
    for layer, x in enumerate(seq):  # x [25 n, dim]
        ax = figure.add_subplot(height, width, layer + 1)
        image = ax.imshow(x @ x.T, cmap="cividis", vmin=-1, vmax=1, origin="lower", extent=(0, end, 0, end))
        ax.set(title=f"layer {layer}", xlabel="time (s)", ylabel="time (s)")
        ax.label_outer()
    figure.colorbar(image, ax=figure.axes, label="cosine similarity", shrink=0.8)
    return figure

def attention_figure(model, wave):
    """Log-mel spectrogram of a window [1, 64000]; below, what the class tokens attend to, a row per head."""
    mel, paid, n = model.front_end(wave)[0].cpu().numpy(), attention(model, wave), len(model.class_tokens)
    figure = Figure((9, 2.6 + 1.9 * n), layout="constrained")
    top, *below = figure.subplots(1 + n, sharex=True)
    style = dict(cmap="cividis", aspect="auto", interpolation="nearest")
    extent = (0, SECONDS, 0, mt2.N_MELS)  # s and mel bands
    image = top.imshow(mel[0].T, origin="lower", extent=extent, vmin=mel.max() - 80, **style)
    top.set(ylabel="mel band", title="log-mel spectrogram; white: onsets by spectral flux")
    figure.colorbar(image, ax=top, label="dB")
    flux = of_spectrum("flux", model.front_end)(wave)["curve"][0, :, :, 0].cpu()  # [1, 126]
    for frame in (peaks(flux) & (flux > flux.mean() + flux.std())).nonzero()[:, 1].tolist():  # clear ones
        top.axvline(frame * HOP_S, color="w", lw=1)
    for ax, name in zip(below, model.class_tokens):
        maps, blocks = paid[name][:, 0].cpu().numpy(), len(model.blocks)  # [blocks, heads, frames]
        heads = (maps / maps.max(2, keepdims=True)).reshape(-1, maps.shape[2])  # a row each, of maximum 1
        image = ax.imshow(heads, vmin=0, vmax=1, extent=(0, SECONDS, blocks + 0.5, 0.5), **style)
        ax.set(title=f"attention of class token {name}", ylabel="block (heads)", yticks=range(1, blocks + 1))
        ax.hlines(np.arange(1, blocks) + 0.5, 0, SECONDS, color="w", lw=2)  # between blocks
        figure.colorbar(image, ax=ax, label="of row maximum")
    below[-1].set_xlabel("time (s)")
    return figure

def circle_figure(model, waves):
    """y around the circle of fifths, time outwards, one value a second, of consecutive windows [n, 64000]."""
    waves = waves.flatten().unfold(0, SAMPLES, SAMPLE_RATE)  # one a second
    y, c_major = mt2.key_profile(model, waves)[0], mt2.key_phase(mt2.calibrate(model, waves.device))
    angle = -(mt2.key_phase(y) * c_major.conj()).angle().numpy()  # 0: C major; a fifth up: + 30 degrees
    # y's bin of C: a one-hot y there is nearest to the phase of C major
    bin_of_c = (mt2.key_phase(torch.eye(12)) * c_major.conj()).real.argmax()
    fifths = 7 * torch.arange(12) % 12
    y = y[:, (fifths + bin_of_c) % 12].repeat_interleave(9, 1).numpy()  # [n, 12 x 9]: so the cells look round
    figure = Figure((7, 6), layout="constrained")
    ax = figure.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    time, turn = np.arange(len(y) + 1), math.pi / 6  # s, and the angle of a fifth
    image = ax.pcolormesh(np.linspace(-0.5, 11.5, 109) * turn, time, y, cmap="cividis", vmin=0)
    ax.plot(angle, time[:-1] + 0.5, "o", color="k", mec="w", ms=5)
    ax.set_rlabel_position(math.degrees(np.angle(np.exp(1j * angle).mean())) + 180)  # opposite the dots
    ax.tick_params(axis="y", colors="w")
    names = [f"{PITCHES[t]}/{MINORS[(t + 9) % 12].lower()}" for t in fifths]
    ax.set(xticks=[turn * i for i in range(12)], xticklabels=names,
           title="y, its place on the circle (dots); outwards: start of window (s)\n")
    figure.colorbar(image, ax=ax, label="probability", shrink=0.7, pad=0.1)
    return figure

# ---- Commands
SEEDS = (0, 1, 2)  # each draws the files a probe trains on

def measure(models, others, args, device):
    """Probe models, an iterable of (name, seeds, model) that may train as it goes, and other systems, beside
    references; print and write results."""
    out = Path(args.out)
    need(args.seed >= 0, f"--seed {args.seed}: at least 0")
    asked = [t.strip() for t in args.task.lower().split(",")] if args.task else []
    if args.data:
        need(asked, f"--data {args.data}: name the columns to predict, as in --task key,instrument")
        files, truth, parts = manifest(args.data, asked, args.seed)
        frames = any(KINDS.get(name) in FRAME_TASKS for name in asked)  # 0.3 MB a window
        batches, total = read_files(files, frames), len(files)  # nothing is read yet
    else:
        names = "key", "key_signature", "instrument", "tags", "tempo", "chord", "beat", "onset"
        wrong, asked = sorted({*asked} - {*names}), asked or names
        need(not wrong, f"--task {wrong[:1]}: generated music has {', '.join(names)}; for others give --data")
        parts = dict.fromkeys(names, torch.arange(sum(COUNTS)).split(COUNTS))
        truth = defaultdict(list)  # fills as the music is made
        batches, total = generated(truth), sum(COUNTS) // CHUNK
    ready(out)
    if models := list(models):
        torch.manual_seed(0)  # the untrained twin of the last model
        models = [*models, ("untrained", SEEDS, mt2.build(models[-1][2].config).to(device).eval())]
    spectra = lru_cache(1)(mt2.FrontEnd().to(device))  # once a batch: all get one tensor
    # a name and the seeds of its probes: models of an ablation share the name, not the seed
    systems = {(name, seeds): of_model(model, spectra) for name, seeds, model in models} | others
    systems |= {(name, SEEDS): of_spectrum(name, spectra) for name in ("log-mel", "chroma", "flux")}
    systems |= {(f"{name} attention", seeds[:1]): of_attention(model)  # one: no probe is fit
                for name, seeds, model in models if model.class_tokens}
    found, owner, now, kept = collect(systems, progress(batches, "music", total), device)
    tasks = {}
    for name in asked:
        make = FRAME_TASKS.get(KINDS.get(name))
        tasks[name] = (make(name, truth[name], owner[kept], now[kept]) if make
                       else clip_task(name, truth[name], owner))
        train, valid, test = parts[name] = [p[torch.isin(p, tasks[name].owner)] for p in parts[name]]
        need(len(train) > 1 and len(test), f"column '{name}': too few files of train or test could be read")
    results = study(found, tasks, parts, device, args.mix)
    # first to the disk, then to the screen: what took minutes must outlive a flaw in a table
    write(out / "results.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    table(results)
    draw(out / "layers.png", layers_figure(results))
    unscored = sorted({*asked} - {row["task"] for row in results if row["value"] is not None})
    need(not unscored, f"column {unscored[:1]}: no metric can score its test files")
    if args.data:
        none_lost(len(owner.unique()), files)

def command_table(args, device):
    """Linear probes of runs or other encoders, beside their references."""
    need(args.run or args.encoder, "name a run folder, or another encoder with --encoder")
    taken = [run for run in args.run if run in REFERENCES or run.endswith(" attention")]
    need(not taken, f"{taken[:1]}: the name of a reference; append /model.pt")
    models = [(run, SEEDS, mt2.load(run, device)) for run in args.run]
    others = {(spec, SEEDS): of_package(spec, device, args.download, args.trust_remote_code)
              for spec in args.encoder}
    home = Path(args.run[0]) if args.run else Path("runs/probe")
    home = home.parent if home.is_file() else home  # of a model.pt its folder
    # a manifest's results do not replace those on generated music
    args.out = args.out or (home / Path(args.data).stem if args.data else home)
    measure(models, others, args, device)

def command_ablation(args, device):
    """Train contrastive, equivariant and MT2 for the same steps with several seeds, and probe them all."""
    args.out = args.out or "runs/ablation"
    kinds = dict(contrastive=("con", "mel"), equivariant=("eq", "vqt"), MT2=("eq,con", "mel,vqt"))
    need(args.seeds > 0, f"--seeds {args.seeds}: at least 1")

    def trained():  # one after another, once `measure` has found nothing wrong with the flags
        for name, (tasks, inputs) in kinds.items():
            for seed in range(args.seeds):
                config = dict(out=f"{args.out}/{name}{seed}", steps=args.steps, seed=seed, device=args.device)
                run = mt2.train(mt2.Config(tasks=tasks, inputs=inputs, **config))
                yield name, (seed,), mt2.load(run, device)
    measure(trained(), {}, args, device)

def command_embed(args, device):
    """Every readout [layers, windows, dim] of 4 s windows, and their names and times [windows], as an npz."""
    out = Path(args.out or "features.npz")
    system = {("", ()): of_model(mt2.load(args.run, device), mt2.FrontEnd().to(device))}  # no name, no seeds
    good = out.suffix == ".npz" and not out.is_dir()
    need(good, f"--out {out}: must be a file that ends in .npz, so that no song is replaced by mistake")
    ready(out.parent)
    files = read_files(progress(args.file, "files"), frames=False)
    found, owner, now, _ = collect(system, files, device)
    names, times = np.array(args.file)[owner.numpy()], now[:, 0]  # of each window its file and start in s
    write(out, partial(np.savez, names=names, times=times, **found["", ()]))
    none_lost(len(owner.unique()), args.file)

def command_key(args, device):
    """Key signatures of songs, without labels; with --data, how many agree with its column `key`."""
    need(bool(args.file) != bool(args.data), "key: name sound files, or a manifest with --data")
    files, truth, _ = manifest(args.data, ["key"], for_probe=False) if args.data else (args.file, {}, None)
    need(files, f"{args.data}: no file has a key")
    model = mt2.load(args.run, device)
    need("eq" in model.class_tokens, f"{args.run}: has no equivariant token, so it cannot tell keys")
    crops = tuple(range(2, 14))  # each of the twelve rotations once, so that no pitch class is preferred
    in_c = mt2.calibrate(model, device, crops)
    found, away, windows = 0, [], []  # files read; of labelled ones distance in fifths, right windows
    sheet = csv.writer(tqdm, lineterminator="")  # calls tqdm.write: a line above the bar
    if args.csv:
        sheet.writerow(("file", "major", "minor", "confidence"))
    for waves, owner, _, _ in read_files(progress(files, "files")):
        i = int(owner[0])
        found, file = found + 1, mt2.printable(files[i])
        level = waves.abs().amax(1)
        waves = waves[level >= 1e-4 * level.max()]  # windows 80 dB below the loudest are silent: no say
        y = mt2.key_profile(model, waves.to(device), crops)  # [crops, windows, 12]
        tonic = int(mt2.key_signature(y.mean((0, 1)), in_c))
        sure = mt2.key_phase(y).sgn().mean().abs().item()  # 1 if all windows and crops agree
        major, minor = KEYS[tonic], KEYS[12 + (tonic + 9) % 12]
        if args.csv:
            sheet.writerow((file, major, minor, f"{sure:.2f}"))
        else:
            tqdm.write(f"{major + ' or ' + minor:20} confidence {sure:.2f}  {file}")
        if truth:
            label, = truth["key"][i]
            signature = (label + 3 * (label > 11)) % 12  # 12 + t is t minor, whose relative major is t + 3
            away.append(7 * (tonic - signature) % 12)  # in fifths
            windows += (mt2.key_signature(y.mean(0), in_c) == signature).tolist()
    if away:
        exact, fifth = (np.isin(away, near).mean() for near in ((0,), (0, 1, 11)))
        print(f"{exact:.3f} right, {fifth:.3f} within a fifth, of {len(away)} files; "
              f"{np.mean(windows):.3f} right of their 4 s windows", file=sys.stderr)
    none_lost(found, files)

@torch.no_grad()
def command_figures(args, device):
    """Of a sound file: ssm.png (its first 32 s), attention.png (4 s) and circle.png (a minute; needs eq)."""
    out = Path(args.out or "pictures")
    model = mt2.load(args.run, device)
    need(model.class_tokens, f"{args.run}: a waveform encoder has no attention to draw")
    waves = cut(args.file)[:15].to(device)
    ready(out)
    draw(out / "ssm.png", similarity_figure(model, waves[:8]))
    draw(out / "attention.png", attention_figure(model, waves[:1]))
    if "eq" in model.class_tokens:
        draw(out / "circle.png", circle_figure(model, waves))

FLAGS = {  # a * or + at the end (any number, at least one) is not part of the name
    "run": dict(help="run folder or model.pt"), "run*": dict(nargs="*", help="run folders or files model.pt"),
    "file": dict(help="sound file"), "file*": dict(nargs="*", help="sound files"),
    "file+": dict(nargs="+", help="sound files"),
    "--data": dict(help="manifest.csv with columns path, labels, perhaps split"),
    "--task": dict(help="columns of the manifest, or tasks on generated music; comma-separated"),
    "--encoder": dict(action="append", default=[], help="muq:DIR, mert:DIR, musicfm:DIR or module:callable"),
    "--download": dict(action="store_true", help="let a package fetch its weights by name"),
    "--trust-remote-code": dict(action="store_true", help="let transformers run code beside the weights"),
    "--mix": dict(action="store_true", help="also probe a learned mixture of the layers"),
    "--seed": dict(type=int, default=0, help="of the split into train and test, where the manifest has none"),
    "--steps": dict(type=int, default=400, help="training steps of each model"),
    "--seeds": dict(type=int, default=3, help="models of each kind"),
    "--out": dict(help="folder to write to (else RUN, RUN/MANIFEST, pictures, runs/ablation); embed: npz"),
    "--csv": dict(action="store_true", help="print a CSV table"),
    "--device": dict(default="auto", help="auto, cpu or cuda")}
COMMANDS = {
    "table": (command_table, "run* --encoder --download --trust-remote-code"
                             " --data --task --mix --seed --out"),
    "key": (command_key, "run file* --data --csv"),
    "embed": (command_embed, "run file+ --out"),
    "figures": (command_figures, "run file --out"),
    "ablation": (command_ablation, "--steps --seeds --data --task --mix --seed --out")}

def main(words):
    """Without a command's name in front: the table."""
    name, *words = words if words and words[0] in COMMANDS else ["table", *words]
    function, flags = COMMANDS[name]
    parser = argparse.ArgumentParser(f"probe.py {name}", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__, epilog=f"{name}: {function.__doc__}")
    parser.error = lambda message: sys.exit(f"probe: {message}; see --help")
    for flag in (*flags.split(), "--device"):
        parser.add_argument(flag.rstrip("*+"), **FLAGS[flag])
    args = parser.parse_intermixed_args(words)  # songs may stand before flags, behind them or both
    try:
        function(args, mt2.pick_device(args.device))
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        sys.exit(f"probe: {(str(error) or type(error).__name__).splitlines()[0]}")
    except KeyboardInterrupt:
        mt2.stop("probe: stopped")

if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # names of files may hold what a screen cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    main(sys.argv[1:])
