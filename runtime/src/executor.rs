//! Runs programs of a plan on the CPU backend.
//!
//! Loading a program resolves every operand of every kernel call to an address, once; running it is a loop over calls.
//! Arenas are allocated once for the largest program, so loaded programs stay valid for the life of the executor.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use ltxc_ir::plan::{
    FileTensor, FunctionCall, Operand, Place, Plan, PlanFunction, Program, Slot, SlotPlace, Step, WeightOrigin, Work,
};
use ltxc_ir::{DType, TensorType};
use ltxc_kernels::catalogue::workspace_bytes;
use ltxc_kernels::cpu::{Arg, Output, launch};

use crate::error::RunError;
use crate::memory::Memory;
use crate::weights::WeightFiles;

/// Runs the programs of one plan.
pub struct Executor<'a> {
    plan: &'a Plan,
    weights: &'a WeightFiles,
    arenas: Vec<Memory>,
    state: Memory,
    workspace: Vec<u8>,
    /// Constants of every function, aligned; by function.
    constants: Vec<Memory>,
    loaded: BTreeMap<String, Loaded<'a>>,
    packed: BTreeMap<PackedKey, Rc<Memory>>,
    interrupt: &'a AtomicBool,
}

/// A recipe and the complete keys it is applied to.
type PackedKey = (u32, Vec<(u32, String)>);

/// A program whose calls are bound to addresses.
struct Loaded<'a> {
    calls: Vec<BoundCall<'a>>,
    /// Keeps the packed weights alive that calls point into.
    _packed: Vec<Rc<Memory>>,
}

struct BoundCall<'a> {
    work: &'a Work,
    args: Vec<(&'a TensorType, *const u8)>,
    results: Vec<(&'a TensorType, *mut u8)>,
}

/// Where the places of a function that is being bound lie.
struct Frame<'f> {
    /// Start of the function's frame in each arena.
    arenas: Vec<*mut u8>,
    params: Vec<*mut u8>,
    results: Vec<*mut u8>,
    prefix: &'f str,
}

impl<'a> Executor<'a> {
    /// An executor of `plan`, which must have passed verification (every plan that was decoded has). Setting `interrupt`
    /// stops a run at the next kernel.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(plan: &'a Plan, weights: &'a WeightFiles, interrupt: &'a AtomicBool) -> Result<Executor<'a>, RunError> {
        let arenas = plan.arena_bytes().into_iter().map(Memory::new).collect::<Result<_, _>>()?;
        let mut constants = Vec::with_capacity(plan.functions.len());
        for function in &plan.functions {
            let mut memory = Memory::new(function.constants.len() as u64)?;
            memory.bytes_mut().copy_from_slice(&function.constants);
            constants.push(memory);
        }
        Ok(Executor {
            plan,
            weights,
            arenas,
            state: Memory::new(plan.state_bytes())?,
            workspace: Vec::new(),
            constants,
            loaded: BTreeMap::new(),
            packed: BTreeMap::new(),
            interrupt,
        })
    }

    /// The plan that is run.
    pub fn plan(&self) -> &'a Plan {
        self.plan
    }

    /// Binds `program`, if that has not been done: finds its weights and runs their recipes.
    ///
    /// # Errors
    /// A weight that is missing or misshapen, or not enough memory.
    pub fn load(&mut self, program: &str) -> Result<(), RunError> {
        if self.loaded.contains_key(program) {
            return Ok(());
        }
        let program = self.program(program)?;
        let slots = |slots: &[Slot], me: &mut Self| slots.iter().map(|s| me.slot_start(s)).collect::<Vec<_>>();
        let (params, results) = (slots(&program.inputs, self), slots(&program.outputs, self));
        let arenas = self.arenas.iter_mut().zip(&program.frame).map(|(m, &o)| {
            // SAFETY: verification: the frame lies inside the arena, which is as large as the largest program's.
            unsafe { m.start().add(o as usize) }
        });
        let frame = Frame { arenas: arenas.collect(), params, results, prefix: "" };
        let mut loaded = Loaded { calls: Vec::new(), _packed: Vec::new() };
        self.bind(program.function, &frame, &mut loaded)?;
        let threads = rayon::current_num_threads();
        let need = loaded.calls.iter().map(|c| {
            let args: Vec<&TensorType> = c.args.iter().map(|a| a.0).collect();
            let results: Vec<&TensorType> = c.results.iter().map(|r| r.0).collect();
            workspace_bytes(c.work, &args, &results, threads)
        });
        let need = need.max().unwrap_or(0);
        if self.workspace.len() < need {
            self.workspace = vec![0; need];
        }
        self.loaded.insert(program.name.clone(), loaded);
        Ok(())
    }

    /// Forgets all loaded programs, packed weights and values, and gives their memory back.
    ///
    /// # Errors
    /// If the memory cannot be reserved anew.
    pub fn unload_all(&mut self) -> Result<(), RunError> {
        self.loaded.clear();
        self.packed.clear();
        self.workspace = Vec::new();
        self.arenas = self.plan.arena_bytes().into_iter().map(Memory::new).collect::<Result<_, _>>()?;
        self.state = Memory::new(self.plan.state_bytes())?;
        Ok(())
    }

    /// Runs `program`, loading it first if need be.
    ///
    /// # Errors
    /// As for [`Executor::load`], and [`RunError::Interrupted`].
    pub fn run(&mut self, program: &str) -> Result<(), RunError> {
        self.run_observed(program, &mut |_| {})
    }

    /// Like [`Executor::run`], and calls `observe` after every kernel call with its number: calls are counted in the
    /// order of the steps, those of called functions included.
    ///
    /// # Errors
    /// Those of [`Executor::run`].
    pub fn run_observed(&mut self, program: &str, observe: &mut dyn FnMut(usize)) -> Result<(), RunError> {
        self.load(program)?;
        let loaded = &self.loaded[program];
        for (number, call) in loaded.calls.iter().enumerate() {
            if self.interrupt.load(Ordering::Relaxed) {
                return Err(RunError::Interrupted);
            }
            let args: Vec<Arg<'_>> = call.args.iter().map(|&(ty, ptr)| Arg { ty, ptr }).collect();
            let results: Vec<Output<'_>> = call.results.iter().map(|&(ty, ptr)| Output { ty, ptr }).collect();
            // SAFETY: verification: types fit the kernel, operands lie inside their memory and overlap no result beyond
            // what the kernel allows. Binding: addresses are aligned and their memory lives as long as the executor.
            unsafe { launch(call.work, &args, &results, &mut self.workspace) };
            observe(number);
        }
        Ok(())
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
        let (memory, offset) = self.slot_memory(slot);
        memory.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Reads an f32 output of a program, in place.
    ///
    /// # Errors
    /// A slot that does not exist or is not f32: a bug of the driver.
    pub fn read(&self, program: &str, output: &str) -> Result<&[f32], RunError> {
        let slot = self.program(program)?.output(output).ok_or_else(|| no_slot(program, output))?;
        if slot.ty.dtype != DType::F32 {
            return Err(RunError::Internal(format!("`{program}.{output}` is {}, not f32", slot.ty)));
        }
        Ok(bytemuck::cast_slice(self.read_bytes(program, output)?))
    }

    /// Reads an output of a program as the bytes of its elements, in place.
    ///
    /// # Errors
    /// A slot that does not exist: a bug of the driver.
    pub fn read_bytes(&self, program: &str, output: &str) -> Result<&[u8], RunError> {
        let slot = self.program(program)?.output(output).ok_or_else(|| no_slot(program, output))?;
        let (memory, offset) = match slot.place {
            SlotPlace::Arena { arena, offset } => (&self.arenas[arena as usize], offset as usize),
            SlotPlace::State { offset } => (&self.state, offset as usize),
        };
        Ok(&memory.bytes()[offset..offset + slot.ty.bytes()])
    }

    /// The program `name` of the plan.
    ///
    /// # Errors
    /// If there is none: a bug of the driver, or a plan made by another one.
    pub fn program(&self, name: &str) -> Result<&'a Program, RunError> {
        self.plan.program(name).ok_or_else(|| RunError::Internal(format!("the plan has no program `{name}`")))
    }

    fn slot_memory(&mut self, slot: &Slot) -> (&mut Memory, usize) {
        match slot.place {
            SlotPlace::Arena { arena, offset } => (&mut self.arenas[arena as usize], offset as usize),
            SlotPlace::State { offset } => (&mut self.state, offset as usize),
        }
    }

    fn slot_start(&mut self, slot: &Slot) -> *mut u8 {
        let (memory, offset) = self.slot_memory(slot);
        // SAFETY: verification: the slot lies inside its memory.
        unsafe { memory.start().add(offset) }
    }

    fn bind(&mut self, function: u32, frame: &Frame<'_>, loaded: &mut Loaded<'a>) -> Result<(), RunError> {
        let index = function as usize;
        let function: &'a PlanFunction = &self.plan.functions[index];
        let weights =
            function.weights.iter().map(|w| self.weight(w, frame.prefix, loaded)).collect::<Result<Vec<_>, _>>()?;
        let constants = self.constants[index].start();
        let address = |operand: &Operand| -> *mut u8 {
            let base = match operand.place {
                Place::Frame { arena } => frame.arenas[arena as usize],
                Place::Param(i) => frame.params[i as usize],
                Place::Result(i) => frame.results[i as usize],
                Place::Weight(i) => weights[i as usize],
                Place::Constant => constants,
            };
            // SAFETY: verification: the operand lies inside what it is in.
            unsafe { base.add(operand.offset as usize) }
        };
        for step in &function.steps {
            match step {
                Step::Kernel(call) => loaded.calls.push(BoundCall {
                    work: &call.work,
                    args: call.args.iter().map(|a| (&a.ty, address(a).cast_const())).collect(),
                    results: call.results.iter().map(|r| (&r.ty, address(r))).collect(),
                }),
                Step::Call(call) => {
                    let prefix = format!("{}{}", frame.prefix, call.prefix);
                    let callee = callee_frame(call, frame, &prefix, &address);
                    self.bind(call.function, &callee, loaded)?;
                }
            }
        }
        Ok(())
    }

    /// Address of a weight: inside the mapped file, or a packed copy.
    fn weight(
        &mut self,
        weight: &'a ltxc_ir::plan::PlanWeight,
        prefix: &str,
        loaded: &mut Loaded<'a>,
    ) -> Result<*mut u8, RunError> {
        let keys = |tensors: &[FileTensor]| -> Vec<(u32, String)> {
            tensors.iter().map(|t| (t.source, format!("{prefix}{}", t.key))).collect()
        };
        let (key, recipe) = match &weight.origin {
            WeightOrigin::File(tensor) => {
                let bytes = self.weights.tensor(tensor, &format!("{prefix}{}", tensor.key))?;
                if bytes.as_ptr().align_offset(tensor.ty.dtype.bytes()) == 0 {
                    // Weights are only ever read; the mutable type is the one of all addresses.
                    return Ok(bytes.as_ptr().cast_mut());
                }
                ((u32::MAX, keys(std::slice::from_ref(tensor))), None)
            }
            WeightOrigin::Packed { function, tensors } => ((*function, keys(tensors)), Some(*function)),
        };
        let memory = match self.packed.get(&key) {
            Some(memory) => memory.clone(),
            None => {
                let memory = Rc::new(self.pack(weight, recipe, &key.1)?);
                self.packed.insert(key, memory.clone());
                memory
            }
        };
        let address = memory.bytes().as_ptr().cast_mut();
        loaded._packed.push(memory);
        Ok(address)
    }

    /// Runs a recipe, or copies a tensor that does not stand aligned in its file.
    fn pack(
        &mut self,
        weight: &'a ltxc_ir::plan::PlanWeight,
        recipe: Option<u32>,
        keys: &[(u32, String)],
    ) -> Result<Memory, RunError> {
        let mut result = Memory::new(weight.ty.bytes() as u64)?;
        let mut tensors = Vec::with_capacity(keys.len());
        for (tensor, (_, key)) in weight.origin.tensors().iter().zip(keys) {
            let bytes = self.weights.tensor(tensor, key)?;
            let mut aligned = Memory::new(bytes.len() as u64)?;
            aligned.bytes_mut().copy_from_slice(bytes);
            tensors.push(aligned);
        }
        let Some(recipe) = recipe else {
            return Ok(tensors.pop().unwrap_or(result));
        };
        let function = &self.plan.functions[recipe as usize];
        let mut arenas = function.frame_bytes.iter().map(|&b| Memory::new(b)).collect::<Result<Vec<_>, _>>()?;
        let frame = Frame {
            arenas: arenas.iter_mut().map(Memory::start).collect(),
            params: tensors.iter_mut().map(Memory::start).collect(),
            results: vec![result.start()],
            prefix: "",
        };
        let mut loaded = Loaded { calls: Vec::new(), _packed: Vec::new() };
        self.bind(recipe, &frame, &mut loaded)?;
        let threads = rayon::current_num_threads();
        for call in &loaded.calls {
            let args: Vec<Arg<'_>> = call.args.iter().map(|&(ty, ptr)| Arg { ty, ptr }).collect();
            let results: Vec<Output<'_>> = call.results.iter().map(|&(ty, ptr)| Output { ty, ptr }).collect();
            let types =
                (args.iter().map(|a| a.ty).collect::<Vec<_>>(), results.iter().map(|r| r.ty).collect::<Vec<_>>());
            let mut workspace = vec![0; workspace_bytes(call.work, &types.0, &types.1, threads)];
            // SAFETY: as in `run`; the memory of the recipe lives until the end of this function.
            unsafe { launch(call.work, &args, &results, &mut workspace) };
        }
        Ok(result)
    }
}

fn callee_frame<'f>(
    call: &FunctionCall,
    caller: &Frame<'_>,
    prefix: &'f str,
    address: &dyn Fn(&Operand) -> *mut u8,
) -> Frame<'f> {
    let arenas = caller.arenas.iter().zip(&call.frame).map(|(&start, &offset)| {
        // SAFETY: verification: the callee's frame lies inside the caller's.
        unsafe { start.add(offset as usize) }
    });
    Frame {
        arenas: arenas.collect(),
        params: call.args.iter().map(address).collect(),
        results: call.results.iter().map(address).collect(),
        prefix,
    }
}

fn no_slot(program: &str, name: &str) -> RunError {
    RunError::Internal(format!("program `{program}` has no slot `{name}`"))
}
