//! Profiles in the trace event format that Perfetto and chrome://tracing open.
//!
//! One track has programs and what binding them took, one has kernel calls; counters show memory and bandwidth. The device is
//! waited for after each call, so that times are those of single kernels; a run without a profile is a little faster.

use std::time::{Duration, Instant};

use ltxc_ir::plan::summary::weight_bytes;
use ltxc_ir::plan::{Plan, Program};
use ltxc_runtime::tap::CallInfo;
use serde_json::{Value, json};

/// Tracks by number.
const PROGRAMS: u32 = 1;
const KERNELS: u32 = 2;

/// A profile in the making.
#[derive(Debug)]
pub struct Profile {
    started: Instant,
    begun: Option<Instant>,
    events: Vec<Value>,
}

impl Default for Profile {
    fn default() -> Profile {
        let track = |number: u32, name: &str| json!({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}});
        let process = json!({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "ltxc"}});
        let events = vec![process, track(PROGRAMS, "programs"), track(KERNELS, "kernels")];
        Profile { started: Instant::now(), begun: None, events }
    }
}

impl Profile {
    /// A program was bound in the time that has just passed.
    pub fn loaded(&mut self, plan: &Plan, program: &Program, elapsed: Duration) {
        let (mapped, packed) = weight_bytes(plan, program);
        let args = json!({"mapped_weight_bytes": mapped, "packed_weight_bytes": packed});
        self.span(PROGRAMS, &format!("load {}", program.name), "upload", elapsed, args);
        let arenas = program.arena_bytes.iter().fold(0u64, |n, &b| n.saturating_add(b));
        let state = plan.groups.get(program.group as usize).map_or(0, |g| g.state_bytes);
        let memory = json!({"arena": arenas, "state": state, "packed weights": packed});
        self.counter("memory (bytes)", memory);
    }

    /// A program begins.
    pub fn begin(&mut self, _: &Program) {
        self.begun = Some(Instant::now());
    }

    /// A call ended, and took so long.
    pub fn called(&mut self, _: &Program, call: &CallInfo, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64().max(1e-9);
        let args = json!({
            "value": call.name, "function": call.step.0, "step": call.step.1, "flops": call.flops, "bytes": call.bytes,
            "gflop_per_s": call.flops as f64 / seconds / 1e9, "gb_per_s": call.bytes as f64 / seconds / 1e9,
        });
        self.span(KERNELS, &call.kernel, "kernel", elapsed, args);
    }

    /// A program ended.
    pub fn end(&mut self, program: &Program) {
        let Some(begun) = self.begun.take() else { return };
        self.span(PROGRAMS, &program.name, "program", begun.elapsed(), json!({"rate": program.rate.name()}));
    }

    /// The profile as a file.
    pub fn to_json(&self) -> Value {
        json!({"displayTimeUnit": "ms", "traceEvents": self.events})
    }

    fn span(&mut self, track: u32, name: &str, category: &str, elapsed: Duration, args: Value) {
        let end = self.started.elapsed();
        let start = end.saturating_sub(elapsed);
        self.events.push(json!({
            "ph": "X", "pid": 1, "tid": track, "name": name, "cat": category,
            "ts": start.as_nanos() as f64 / 1e3, "dur": elapsed.as_nanos() as f64 / 1e3, "args": args,
        }));
    }

    fn counter(&mut self, name: &str, values: Value) {
        let at = self.started.elapsed().as_nanos() as f64 / 1e3;
        self.events.push(json!({"ph": "C", "pid": 1, "name": name, "ts": at, "args": values}));
    }
}
