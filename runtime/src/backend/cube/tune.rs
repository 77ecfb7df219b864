//! What a plan may carry for a device: tiles of calls that were measured on it, and kernels as they were launched there.

use std::time::{Duration, Instant};

use ltxc_ir::plan::{KernelCall, Kernels, Operand, Plan, Step, Target, TunedCall};
use ltxc_kernels::cube::Schedule;
use ltxc_kernels::cube::tracked::Known;

use super::Cube;
use crate::backend::{Backend, Call, CallId, Progress, Region};
use crate::error::RunError;

/// How often a call is measured with each tile.
const MEASUREMENTS: usize = 3;

impl<'a, R: Known> Cube<'a, R> {
    /// Takes over what was measured, if it was measured on such a device.
    pub(super) fn take_tuned(&mut self, kernels: Option<&Kernels>) {
        let fitting = kernels.filter(|kernels| kernels.device == self.log.device());
        self.tiles = fitting.iter().flat_map(|kernels| &kernels.tuned).map(|tuned| (tuned.call, tuned.tile)).collect();
    }

    /// See [`Backend::tune`].
    pub(super) fn tune_plan(
        &mut self,
        plan: &'a Plan,
        measures: bool,
        done: &mut Progress<'_>,
    ) -> Result<Kernels, RunError> {
        self.accept(plan)?;
        let steps = plan.functions.iter().flat_map(|function| &function.steps);
        let calls: Vec<&KernelCall> = steps
            .filter_map(|step| match step {
                Step::Kernel(call) => Some(call),
                Step::Call(_) => None,
            })
            .collect();
        if measures {
            self.tiles.clear();
        }
        let (all, mut begun) = (calls.len() * (1 + usize::from(measures)), 0);
        for &call in calls.iter().filter(|_| measures) {
            self.tune_call(call)?;
            begun += 1;
            done(begun, all)?;
        }
        // What is carried is launched from here on.
        self.log.begin_round();
        // Uploads are copies, of words and of the bytes that are left, of several and of one.
        let small = self.allocate(8)?;
        for bytes in [8, 7, 4, 1] {
            self.write(Region { buffer: small, offset: 0 }, &[0; 8][..bytes])?;
        }
        for (i, &call) in calls.iter().enumerate() {
            // Recipes run on the processor.
            let bound = self.bind_anywhere(call)?;
            self.launch(bound)?;
            self.synchronize()?;
            self.clear();
            done(begun + i + 1, all)?;
        }
        let kernels = (self.carry)(&self.log.launched_in_round());
        let tuned = self.tiles.iter().map(|(&call, &tile)| TunedCall { call, tile }).collect();
        Ok(Kernels { device: self.log.device(), kernels, tuned })
    }

    /// Measures a call with every tile that it can be cut into, and keeps the fastest.
    fn tune_call(&mut self, call: &'a KernelCall) -> Result<(), RunError> {
        let types = |operands: &'a [Operand]| operands.iter().map(|o| &o.ty).collect::<Vec<_>>();
        let schedule = Schedule::new(&call.work, &types(&call.args), &types(&call.results));
        let schedule = schedule.map_err(|e| self.problem(e))?.with_units(&self.units);
        let (hash, tiles) = (schedule.hash(), schedule.tiles(&self.client));
        if tiles.len() < 2 || self.tiles.contains_key(&hash) {
            return Ok(());
        }
        let mut fastest: Option<(Duration, u32)> = None;
        for tile in tiles {
            self.tiles.insert(hash, tile);
            let time = self.time(call)?;
            if fastest.is_none_or(|(least, _)| time < least) {
                fastest = Some((time, tile));
            }
        }
        self.tiles.extend(fastest.map(|(_, tile)| (hash, tile)));
        Ok(())
    }

    /// The least time that a call takes once its kernels are compiled.
    fn time(&mut self, call: &'a KernelCall) -> Result<Duration, RunError> {
        let bound = self.bind_anywhere(call)?;
        self.launch(bound)?;
        self.synchronize()?;
        let mut least = Duration::MAX;
        for _ in 0..MEASUREMENTS {
            let started = Instant::now();
            self.launch(bound)?;
            self.synchronize()?;
            least = least.min(started.elapsed());
        }
        self.clear();
        Ok(least)
    }

    /// Binds a call to memory of its own.
    fn bind_anywhere(&mut self, call: &'a KernelCall) -> Result<CallId, RunError> {
        let mut place = |operand: &'a Operand| {
            // At the offset that it has in its buffer, as far as that matters.
            let offset = operand.offset % Target::DEVICE_ALIGNMENT;
            let buffer = self.allocate((operand.ty.bytes() as u64).saturating_add(offset))?;
            Ok((&operand.ty, Region { buffer, offset }))
        };
        let args = call.args.iter().map(&mut place).collect::<Result<_, RunError>>()?;
        let results = call.results.iter().map(&mut place).collect::<Result<_, RunError>>()?;
        self.bind(Call { work: &call.work, args, results, flops: call.flops, bytes: call.bytes })
    }
}
