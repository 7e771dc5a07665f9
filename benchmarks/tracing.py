"""What tracing sources costs: a reduced model with `ltmp.trace()` against the same model without, in turns.

    python benchmarks/tracing.py --batch 1 8 32

Weights are random; thresholds are calibrated on smooth random images, so that token counts differ between images.
"""

from __future__ import annotations

import argparse
import statistics

import timm
import torch
from attach_overhead import interleaved
from cpu import smooth_images

import ltmp
from ltmp.learning import calibrate


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--target", type=float, default=0.56, help="share of the dense FLOPs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    images = smooth_images(max(args.batch), model.patch_embed.img_size[0])
    ltmp.attach(model, ltmp.LTMPConfig(engine="packed"))
    calibrate(model, images, args.target)

    def traced(batch: torch.Tensor, every_block: bool) -> ltmp.Trace:
        with ltmp.trace(every_block=every_block) as calls:
            model(batch)
        return calls

    print(f"{args.model}, packed, {args.threads} threads, medians of {args.repeats} rounds")
    for size in args.batch:
        batch = images[:size]
        calls = [lambda: model(batch), lambda: traced(batch, False), lambda: traced(batch, True)]  # noqa: B023
        off, last, every = interleaved(calls, args.repeats, "cpu")
        ratio, ratio_every = (statistics.median(b / a for a, b in zip(off, on, strict=True)) for on in (last, every))
        source = traced(batch, False).sources[0]
        print(
            f"batch {size}: off {1e3 * statistics.median(off):.2f} ms, traced {ratio:.3f}, every block "
            f"{ratio_every:.3f}, {source.untyped_storage().nbytes() / source.numel():.0f} bytes a patch"
        )


if __name__ == "__main__":
    main()
