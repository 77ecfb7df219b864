//! Finding the first tensor that is wrong: logs of a run, and the commands of `ltxc debug`.
//!
//! | file | what |
//! | --- | --- |
//! | `flags`, `options`, `session` | what a run can log, and the one place where logs hook into a run |
//! | `names` | names of values as people and other tools know them |
//! | `sums`, `log` | lines of sums, and where they go |
//! | `profile` | times of programs and kernels |
//! | `entries`, `compare`, `elements` | logs as numbers under keys, two of them side by side, and two files of tensors |
//! | `recording`, `parity` | recorded tensors of the reference, and how ours compare with them |
//! | `modules`, `pipeline` | one graph, or a whole run, for its values instead of its picture |
//! | `evaluation` | one evaluation of the transformer on given inputs |
//! | `step` | that call printed, written and compared; one block alone |
//! | `lora` | a LoRA here and in the reference |
//! | `bisect`, `reference` | the first op that differs between two settings, and from a reference |
//! | `commands`, `smoke` | commands that run others; a short run of every pipeline |
//! | `noise`, `weights`, `against`, `manifest`, `text`, `vae`, `denoising`, `nan`, `latents`, `positions`, `schedule`, `video_stats` | one part of a model or run each |

mod against;
pub mod bisect;
pub mod command;
pub mod commands;
pub mod compare;
pub mod denoising;
mod elements;
pub mod entries;
pub mod evaluation;
pub mod flags;
mod latents;
pub mod log;
pub mod lora;
mod manifest;
pub mod modules;
pub mod names;
pub mod nan;
pub mod noise;
pub mod options;
pub mod parity;
pub mod pipeline;
mod positions;
pub mod profile;
pub mod recording;
pub mod reference;
pub mod schedule;
pub mod session;
pub mod smoke;
pub mod step;
pub mod sums;
pub mod text;
pub mod vae;
pub mod video_stats;
pub mod weights;
