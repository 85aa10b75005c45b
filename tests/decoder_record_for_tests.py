"""A small record of a network, made up: see `convt_lab.decoder_record`."""

from convt_lab import Problem, decoder_record, records
from convt_lab.decoder_record import MODES, NETWORK, DecoderRecord
from convt_lab.layer_profile import REST
from convt_lab.operator_record import Cold

UPS = ["up1", "up2", "wide", "up3", "up4"]
LAYERS = ["stem", "down1", "down2", "down3", "up1", "fuse1", "up2", "fuse2", "wide", "score"]
LAYERS += ["up3", "up4"]

SHARES = dict.fromkeys(LAYERS, 0.001) | {"wide": 0.004, "up4": 0.003, REST: 0.002}


def made_profile(up4=1.0):
    halves = [dict(SHARES), dict(SHARES), {n: 2 * s for n, s in SHARES.items()} | {REST: 0.0}]
    for half in halves[:2]:
        half["up4"] *= up4
    return decoder_record.Profile(*halves)


def made_errors(scores=1e-7):
    return decoder_record.Errors(scores, 1e-8, {"images": 2e-7, "up4.weight": 3e-7})


def made_time(seconds, enqueue=1e-4):
    return decoder_record.Time(Cold(seconds, 20, 0.001), enqueue)


def made_after(by="measurements", kernel="one_channel", up4=0.2):
    choices = {name: decoder_record.Chosen("pytorch", "so it is") for name in UPS}
    choices["up4"] = decoder_record.Chosen(kernel, "it is faster")
    inference, training = sum(SHARES.values()), 3 * sum(SHARES.values()) - 2 * SHARES[REST]
    saved = (1 - up4) * SHARES["up4"]
    times = {
        "inference": decoder_record.Pair(made_time(inference), made_time(inference - saved)),
        "training": decoder_record.Pair(made_time(training), made_time(training - saved)),
    }
    return decoder_record.After(by, choices, made_errors(), made_profile(up4), times)


def made_mode(name="float32"):
    problem = Problem(2, 4, 4, 8, 8, kernel_size=4, stride=2, padding=1, groups=4)
    alone = {
        layer: decoder_record.Alone(problem, {"pytorch": 0.004, "one_channel": 0.001})
        for layer in UPS
    }
    return decoder_record.Mode(
        name,
        *MODES[name],
        layers=tuple(LAYERS),
        alone=alone,
        before=decoder_record.Run(made_errors(), made_profile()),
        after=(made_after("tables", "pytorch", up4=1.0), made_after()),
    )


def made_record(*modes):
    gpu = records.GPU("NVIDIA Test", (9, 0), 132, 150 * 10**9, 60 * 2**20, 700.0)
    software = records.Software("0.1.0", "2.11.0", "13.0", "9.19.0")
    modes = modes or tuple(map(made_mode, MODES))
    return DecoderRecord(gpu, software, "2026-11-25", 0, 50.0, NETWORK, {"cold": "fast"}, modes)
