//! `ltxc debug` and the logs of a run: they find the faults that they are for, and change nothing otherwise.
//!
//! Faults are planted in a copy of a small model's file; every test that plants one also passes without it.
//!
//! | fault that ports have had | where it is planted, and what must name it |
//! | --- | --- |
//! | velocity passed as x0 | `steps`: `step --velocity` |
//! | shift and scale rows swapped | `faults`: `weights --adaln`, `parity`; `steps`: `step --compare`; `vae`: `vae trace` |
//! | decoder timestep ignored | `vae`: `vae timestep`, `decode` |
//! | upsampler without un-normalise | `vae`: `vae upscale`; `faults`: `parity` |
//! | RoPE interleaved instead of split | `faults`: `compare` at block 0 attn1 |
//! | text encoder: scale, states, layers, rotations, pads, masks | `text`: `text stats`, `compare`, `diff`, `mask` |
//! | gate multiplier between the streams | `faults`: `compare` on model sums |
//! | wrong number of audio tokens | `faults`: stage sums, `positions` |
//! | text attention over as many keys as queries | `steps`: `compare` at attn2 |
//! | LoRA: alpha ignored, not applied, scaled twice, wrong prefix, some layers, inert; another base | `lora`: `lora four-way` |
//! | decoder noise on one side | `faults`: header check of `compare` |
//! | positions in bf16 | `faults`: `positions` |
//! | NaN in a block, a zeroed weight | `faults`, `steps`: `nan`, `run`, `pipeline`; `reference`, `faults`: `bisect` |

#[path = "../cli/binary.rs"]
#[allow(dead_code)] // what other tests use
mod binary;
mod experiments;
mod faults;
mod graphs;
mod logs;
mod lora;
mod noise;
mod parity;
mod reference;
mod steps;
mod text;
mod vae;

/// Folder of the recorded fixtures: `LTXC_FIXTURES`, or those of this repository.
fn root() -> std::path::PathBuf {
    let own = || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    std::env::var_os("LTXC_FIXTURES").map_or_else(own, Into::into)
}
