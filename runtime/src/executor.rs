//! Runs programs of a plan on a device.
//!
//! Loading a program binds every kernel call to memory, once; running it is a loop over calls. Arenas are allocated once
//! for the largest program, so loaded programs stay valid until everything is unloaded.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ltxc_ir::DType;
use ltxc_ir::plan::{KernelDevice, Kernels, Plan, Program, Slot, SlotPlace};

use crate::adapters::AdapterSet;
use crate::backend::{Backend, Binding, BufferId, CallId, Cpu, Frame, KernelCounts, Region};
use crate::error::RunError;
use crate::experiments::Experiments;
use crate::memory::available;
use crate::prefetch::Prefetcher;
use crate::stats::Stats;
use crate::tap::{Role, Sites, Tap, Value, sites};
use crate::weights::WeightFiles;

/// Runs the programs of one plan.
pub struct Executor<'a> {
    plan: &'a Plan,
    backend: Box<dyn Backend<'a> + 'a>,
    binding: Binding<'a>,
    memory: PlanMemory,
    prefetcher: Prefetcher,
    loaded: BTreeMap<String, Loaded>,
    /// Looks at values, if anyone does.
    tap: Option<Box<dyn Tap + 'a>>,
    interrupt: &'a AtomicBool,
}

/// A program that is bound.
struct Loaded {
    calls: Vec<CallId>,
    /// Values that the tap wants, and its calls; nothing without a tap.
    sites: Sites,
}

/// Where values of programs live.
struct PlanMemory {
    arenas: Vec<BufferId>,
    state: BufferId,
}

impl PlanMemory {
    fn new(plan: &Plan, backend: &mut dyn Backend<'_>) -> Result<PlanMemory, RunError> {
        let arenas = plan.arena_bytes().into_iter().map(|bytes| backend.allocate(bytes)).collect::<Result<_, _>>()?;
        Ok(PlanMemory { arenas, state: backend.allocate(plan.state_bytes())? })
    }

    fn slot(&self, slot: &Slot) -> Region {
        match slot.place {
            SlotPlace::Arena { arena, offset } => Region { buffer: self.arenas[arena as usize], offset },
            SlotPlace::State { offset } => Region { buffer: self.state, offset },
        }
    }
}

impl<'a> Executor<'a> {
    /// An executor of `plan` on the CPU: see [`Executor::on`].
    ///
    /// # Errors
    /// A plan for another device, or not enough memory.
    pub fn new(plan: &'a Plan, weights: &'a WeightFiles, interrupt: &'a AtomicBool) -> Result<Executor<'a>, RunError> {
        Executor::on(Box::new(Cpu::default()), plan, weights, interrupt)
    }

    /// An executor of `plan`, which must have passed verification (every plan that was decoded has), on a device. Setting
    /// `interrupt` stops a run at the next kernel.
    ///
    /// # Errors
    /// A plan for another kind of device, or one that does not fit this one.
    pub fn on(
        mut backend: Box<dyn Backend<'a> + 'a>,
        plan: &'a Plan,
        weights: &'a WeightFiles,
        interrupt: &'a AtomicBool,
    ) -> Result<Executor<'a>, RunError> {
        backend.check(plan)?;
        let memory = PlanMemory::new(plan, &mut *backend)?;
        let binding = Binding::new(plan, weights);
        let prefetcher = Prefetcher::default();
        Ok(Executor { plan, backend, binding, memory, prefetcher, loaded: BTreeMap::new(), tap: None, interrupt })
    }

    /// From now on nothing is compiled: what would have to be is an error. `kernels` are those that the device was opened
    /// with.
    ///
    /// # Errors
    /// [`RunError::Frozen`] if the device compiles kernels and these are not for it.
    pub fn freeze(&mut self, kernels: Option<&Kernels>) -> Result<(), RunError> {
        if let Some(device) = self.backend.kernel_device()
            && !kernels.is_some_and(|kernels| kernels.are_compiled_for(&device))
        {
            return Err(RunError::Frozen { device: self.backend.device().name.clone(), kernel: None });
        }
        self.backend.freeze();
        Ok(())
    }

    /// The kernels that were launched so far.
    pub fn kernels(&self) -> KernelCounts {
        self.backend.kernels()
    }

    /// What kernels of a plan must be for to be used; `None` where kernels are part of this program.
    pub fn kernel_device(&self) -> Option<KernelDevice> {
        self.backend.kernel_device()
    }

    /// The plan that is run.
    pub fn plan(&self) -> &'a Plan {
        self.plan
    }

    /// Lets `tap` look at the values of all programs that run from now on, or nobody. What was loaded is bound anew.
    ///
    /// # Errors
    /// If the memory cannot be reserved anew.
    pub fn set_tap(&mut self, tap: Option<Box<dyn Tap + 'a>>) -> Result<(), RunError> {
        self.tap = tap;
        self.unload_all()
    }

    /// Binds `program`, if that has not been done: finds its weights and runs their recipes.
    ///
    /// # Errors
    /// A weight that is missing or misshapen, not enough memory, or a call that the device cannot run.
    pub fn load(&mut self, program: &str) -> Result<(), RunError> {
        if self.loaded.contains_key(program) {
            return Ok(());
        }
        let started = Instant::now();
        let program = self.program(program)?;
        self.prefetch(program);
        let frame = self.frame(program);
        let mut calls = Vec::new();
        self.binding.bind(&mut *self.backend, program.function, &frame, "", &mut calls)?;
        let mut looked_at = Sites::default();
        if let Some(tap) = &mut self.tap {
            looked_at = sites(self.plan, program, &frame);
            looked_at.values.retain(|value| tap.wants(program, value));
            tap.loaded(program, started.elapsed());
        }
        self.loaded.insert(program.name.clone(), Loaded { calls, sites: looked_at });
        Ok(())
    }

    /// Where everything of a program lies.
    fn frame(&self, program: &Program) -> Frame {
        let slots = |slots: &[Slot]| slots.iter().map(|s| self.memory.slot(s)).collect::<Vec<_>>();
        let arenas = self.memory.arenas.iter().zip(&program.frame);
        Frame {
            arenas: arenas.map(|(&buffer, &offset)| Region { buffer, offset }).collect(),
            params: slots(&program.inputs),
            results: slots(&program.outputs),
        }
    }

    /// Runs `program`, which ran last, once more on the same inputs, and names the first value that is NaN or infinite.
    /// A call that writes over what it reads changes nothing: calls write inputs of the program only where they update
    /// state, with what they wrote there before.
    ///
    /// # Errors
    /// Those of [`Executor::run`].
    pub fn first_bad(&mut self, program: &str) -> Result<Option<String>, RunError> {
        self.load(program)?;
        let program = self.program(program)?;
        let sites = sites(self.plan, program, &self.frame(program));
        let mut values = sites.values.iter().peekable();
        let mut bad = None;
        let mut look = |backend: &dyn Backend<'a>, value: &Value| -> Result<(), RunError> {
            let stats = Stats::of_bytes(&value.ty, &backend.read(value.region(), value.ty.bytes() as u64)?);
            if stats.is_bad() && bad.is_none() {
                let (name, n, first) = (&value.name, stats.nan + stats.infinite, stats.first_bad.unwrap_or(0));
                bad = Some(format!("`{name}` with {n} of {} values, from {first} on", stats.ty.elements()));
            }
            Ok(())
        };
        while let Some(value) = values.next_if(|v| v.role == Role::Input) {
            look(&*self.backend, value)?;
        }
        for (number, &call) in self.loaded[&program.name].calls.iter().enumerate() {
            self.backend.launch(call)?;
            while let Some(value) = values.next_if(|v| v.call == number) {
                look(&*self.backend, value)?;
            }
        }
        Ok(bad)
    }

    /// Lets the system fetch what `program` reads, then what later ones do: plans hold programs in the order in which a
    /// run needs them.
    fn prefetch(&self, program: &Program) {
        let (mut seen, mut spans) = (BTreeSet::new(), Vec::new());
        for later in self.plan.programs.iter().skip_while(|p| p.name != program.name) {
            self.binding.spans(later.function, "", &mut seen, &mut spans);
        }
        // As much again stays for whatever else is in memory.
        self.prefetcher.fetch(spans, available() / 2);
    }

    /// Runs programs with these adapters from now on. Where both they and those before leave weights as they are, only
    /// slots are written; else everything is unloaded, as [`Executor::unload_all`] does, so that weights are bound anew.
    ///
    /// # Errors
    /// Adapters that the plan has no slots for, or what a device failed with.
    pub fn set_adapters(&mut self, adapters: AdapterSet) -> Result<(), RunError> {
        if adapters == *self.binding.adapters() {
            return Ok(());
        }
        adapters.check(self.plan)?;
        let leaves_weights = adapters.leaves_weights() && self.binding.adapters().leaves_weights();
        if !leaves_weights && !self.binding.is_empty() {
            self.unload_all()?;
        }
        self.binding.set_adapters(&mut *self.backend, adapters)
    }

    /// Runs programs with these experiments from now on; if they differ from those before, weights are bound anew.
    ///
    /// # Errors
    /// If the memory cannot be reserved anew.
    pub fn set_experiments(&mut self, experiments: &Experiments) -> Result<(), RunError> {
        if experiments == self.binding.experiments() {
            return Ok(());
        }
        self.binding.set_experiments(experiments.clone());
        self.unload_all()
    }

    /// Forgets all loaded programs, packed weights and values, and gives their memory back.
    ///
    /// # Errors
    /// If the memory cannot be reserved anew.
    pub fn unload_all(&mut self) -> Result<(), RunError> {
        self.loaded.clear();
        self.binding.clear();
        self.backend.clear();
        self.memory = PlanMemory::new(self.plan, &mut *self.backend)?;
        Ok(())
    }

    /// Runs `program`, loading it first if need be.
    ///
    /// # Errors
    /// As for [`Executor::load`], and [`RunError::Interrupted`]. What a device reports late fails the next read.
    pub fn run(&mut self, program: &str) -> Result<(), RunError> {
        if self.tap.is_none() {
            return self.run_observed(program, &mut |_| {});
        }
        self.load(program)?;
        // Taken out while it looks, because it looks at what the executor holds.
        let Some(mut tap) = self.tap.take() else { return Ok(()) };
        let result = self.run_tapped(program, &mut *tap);
        self.tap = Some(tap);
        result
    }

    /// Runs a loaded program call by call, and shows `tap` the values that it wants.
    fn run_tapped(&mut self, program: &str, tap: &mut dyn Tap) -> Result<(), RunError> {
        let program = self.program(program)?;
        let Loaded { calls, sites } = &self.loaded[&program.name];
        let backend = &mut self.backend;
        tap.begin(program);
        let mut values = sites.values.iter().peekable();
        while let Some(value) = values.next_if(|v| v.role == Role::Input) {
            tap.value(program, value, &backend.read(value.region(), value.ty.bytes() as u64)?)?;
        }
        for (number, &call) in calls.iter().enumerate() {
            if self.interrupt.load(Ordering::Relaxed) {
                return Err(RunError::Interrupted);
            }
            let started = Instant::now();
            backend.launch(call)?;
            if tap.times_calls() {
                backend.synchronize()?;
                tap.called(program, &sites.calls[number], started.elapsed());
            }
            while let Some(value) = values.next_if(|v| v.call == number) {
                let is_finite = match tap.skips_finite(program, value) {
                    true => backend.is_finite(value.region(), &value.ty)?,
                    false => None,
                };
                if is_finite == Some(true) {
                    tap.finite(program, value);
                    continue;
                }
                // What it was computed from may have been left unread; it is still there if nothing was written over it.
                for name in value.reads.iter().filter(|_| is_finite == Some(false)) {
                    let input = sites.values.iter().rfind(|v| v.name == *name && v.call < number);
                    let Some(input) = input.filter(|v| v.region() != value.region()) else { continue };
                    if tap.skips_finite(program, input) {
                        tap.value(program, input, &backend.read(input.region(), input.ty.bytes() as u64)?)?;
                    }
                }
                tap.value(program, value, &backend.read(value.region(), value.ty.bytes() as u64)?)?;
            }
        }
        // Results of a program without calls.
        for value in values {
            tap.value(program, value, &backend.read(value.region(), value.ty.bytes() as u64)?)?;
        }
        tap.end(program)
    }

    /// Like [`Executor::run`], and calls `observe` after every kernel call with its number: calls are counted in the
    /// order of the steps, those of called functions included. Devices other than the CPU may not have done them by then.
    ///
    /// # Errors
    /// Those of [`Executor::run`].
    pub fn run_observed(&mut self, program: &str, observe: &mut dyn FnMut(usize)) -> Result<(), RunError> {
        self.load(program)?;
        for (number, &call) in self.loaded[program].calls.iter().enumerate() {
            if self.interrupt.load(Ordering::Relaxed) {
                return Err(RunError::Interrupted);
            }
            self.backend.launch(call)?;
            observe(number);
        }
        Ok(())
    }

    /// Like [`Executor::run`], and waits for the device after every kernel call. Returns how long each took, the wait included,
    /// in the order in which [`Executor::run_observed`] counts them.
    ///
    /// # Errors
    /// Those of [`Executor::run`], and what the device failed with.
    pub fn run_timed(&mut self, program: &str) -> Result<Vec<Duration>, RunError> {
        self.load(program)?;
        self.backend.synchronize()?;
        let mut times = Vec::with_capacity(self.loaded[program].calls.len());
        for &call in &self.loaded[program].calls {
            if self.interrupt.load(Ordering::Relaxed) {
                return Err(RunError::Interrupted);
            }
            let start = Instant::now();
            self.backend.launch(call)?;
            self.backend.synchronize()?;
            times.push(start.elapsed());
        }
        Ok(times)
    }

    /// Waits until the device has done everything it was given.
    ///
    /// # Errors
    /// What it failed with.
    pub fn synchronize(&self) -> Result<(), RunError> {
        self.backend.synchronize()
    }

    /// Writes an f32 or i32 input of a program.
    ///
    /// # Errors
    /// A slot that does not exist or has another type: a bug of the driver.
    pub fn write<T: bytemuck::NoUninit>(&mut self, program: &str, input: &str, values: &[T]) -> Result<(), RunError> {
        let slot = self.program(program)?.input(input).ok_or_else(|| no_slot(program, input))?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if bytes.len() != slot.ty.bytes() {
            let found = bytes.len();
            return Err(RunError::Internal(format!("`{program}.{input}` is {}, given {found} bytes", slot.ty)));
        }
        self.backend.write(self.memory.slot(slot), bytes)
    }

    /// Reads an f32 output of a program, in place on the CPU.
    ///
    /// # Errors
    /// A slot that does not exist or is not f32: a bug of the driver. What the device failed with.
    pub fn read(&self, program: &str, output: &str) -> Result<Cow<'_, [f32]>, RunError> {
        let slot = self.program(program)?.output(output).ok_or_else(|| no_slot(program, output))?;
        if slot.ty.dtype != DType::F32 {
            return Err(RunError::Internal(format!("`{program}.{output}` is {}, not f32", slot.ty)));
        }
        Ok(match self.read_bytes(program, output)? {
            Cow::Borrowed(bytes) => Cow::Borrowed(bytemuck::cast_slice(bytes)),
            // Downloaded bytes may lie at any address.
            Cow::Owned(bytes) => {
                let values = bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
                Cow::Owned(values.collect())
            }
        })
    }

    /// [`Executor::read`] of so many values.
    ///
    /// # Errors
    /// Those of [`Executor::read`], and an output of another size: a plan whose settings do not fit its programs.
    pub fn read_values(&self, program: &str, output: &str, expected: usize) -> Result<Cow<'_, [f32]>, RunError> {
        let values = self.read(program, output)?;
        match values.len() {
            found if found == expected => Ok(values),
            found => Err(RunError::Internal(format!("`{program}.{output}` has {found} values, expected {expected}"))),
        }
    }

    /// Reads an output of a program as the bytes of its elements, in place on the CPU.
    ///
    /// # Errors
    /// A slot that does not exist: a bug of the driver. What the device failed with.
    pub fn read_bytes(&self, program: &str, output: &str) -> Result<Cow<'_, [u8]>, RunError> {
        let slot = self.program(program)?.output(output).ok_or_else(|| no_slot(program, output))?;
        self.backend.read(self.memory.slot(slot), slot.ty.bytes() as u64)
    }

    /// The program `name` of the plan.
    ///
    /// # Errors
    /// If there is none: a bug of the driver, or a plan made by another one.
    pub fn program(&self, name: &str) -> Result<&'a Program, RunError> {
        self.plan.program(name).ok_or_else(|| RunError::Internal(format!("the plan has no program `{name}`")))
    }
}

fn no_slot(program: &str, name: &str) -> RunError {
    RunError::Internal(format!("program `{program}` has no slot `{name}`"))
}
