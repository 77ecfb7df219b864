//! Collects the programs of a plan: optimises and lowers each module, and gives every slot its place.
//!
//! Programs of one **group** share state. Two kinds of value live there: what `hoist` made a slow program leave for a
//! fast one, and results of one program that another of the group takes as a parameter of the same name and type. A
//! program that takes and gives such a value updates it in place, if its function can. All other slots lie in the arenas,
//! beside the frame, and last until another program runs.

use std::collections::{BTreeMap, BTreeSet};

use ltxc_ir::plan::verify::verify;
use ltxc_ir::plan::{
    Group, Pipeline, Plan, PlanFunction, Program, Slot, SlotPlace, Step, Target, WeightSource, may_overwrite,
};
use ltxc_ir::{Function, Module, Rate, TensorType};

use crate::error::CompileError;
use crate::lower::{Lowering, lower_module};
use crate::memory::{self, Block, MemoryError};
use crate::optimize_observed;
use crate::options::{Fuse, Options};

/// Collects programs of several modules into one plan. See the module documentation.
pub struct PlanBuilder {
    compiler: String,
    target: Target,
    options: Options,
    sources: Vec<WeightSource>,
    groups: Vec<String>,
    functions: Vec<PlanFunction>,
    programs: Vec<ProgramDraft>,
}

/// A program whose slots have no place yet.
struct ProgramDraft {
    name: String,
    group: usize,
    rate: Rate,
    function: u32,
    inputs: Vec<(String, TensorType)>,
    outputs: Vec<(String, TensorType)>,
    /// The program it was split from, and what crosses between its parts.
    whole: String,
    crossing: BTreeSet<String>,
}

impl PlanBuilder {
    /// Starts a plan written by `compiler` for `target`; `sources` are the weight files that graphs may name.
    pub fn new(compiler: &str, target: Target, options: Options, sources: Vec<WeightSource>) -> PlanBuilder {
        let options = Options {
            max_bindings: options.max_bindings.min(target.max_bindings),
            max_tensor_bytes: options.max_tensor_bytes.min(target.max_tensor_bytes),
            packs_projections: options
                .packs_projections
                .or(Some(target.copies_weights() && options.fuse == Fuse::Full)),
            ..options
        };
        PlanBuilder {
            compiler: compiler.into(),
            target,
            options,
            sources,
            groups: Vec::new(),
            functions: Vec::new(),
            programs: Vec::new(),
        }
    }

    /// Compiles `entry` of `module` as the program `program` of `group`.
    ///
    /// What is hoisted becomes the programs `<program>.generation` and `<program>.evaluation`.
    ///
    /// # Errors
    /// A module that does not verify, an entry or weight source that does not exist, a name that is taken, or a buffer
    /// that the target has no room for.
    pub fn add(&mut self, group: &str, program: &str, module: &Module, entry: &str) -> Result<(), CompileError> {
        self.add_observed(group, program, module, entry, &mut |_, _| {})
    }

    /// Like [`PlanBuilder::add`], and shows the module to `observe` after every pass, with the name of the pass.
    ///
    /// # Errors
    /// Those of [`PlanBuilder::add`].
    pub fn add_observed(
        &mut self,
        group: &str,
        program: &str,
        module: &Module,
        entry: &str,
        observe: &mut dyn FnMut(&'static str, &Module),
    ) -> Result<(), CompileError> {
        let whole = module.function(entry).filter(|_| module.entries.iter().any(|e| e == entry));
        let whole = whole.ok_or_else(|| CompileError::UnknownEntry { name: entry.into() })?;
        let rate = whole.params.iter().map(|p| p.rate).max().unwrap_or(Rate::Generation);
        let module = Module { functions: module.functions.clone(), entries: vec![entry.into()] };
        let module = optimize_observed(&module, &self.options, observe)?;
        let sources: Vec<String> = self.sources.iter().map(|s| s.name.clone()).collect();
        let lowering = Lowering { target: &self.target, sources: &sources };
        let indices = lower_module(&lowering, &module, &format!("{program}/"), &mut self.functions)?;
        let group = self.groups.iter().position(|g| g == group).unwrap_or_else(|| {
            self.groups.push(group.into());
            self.groups.len() - 1
        });
        let parts: Vec<&Function> = module.entries.iter().filter_map(|e| module.function(e)).collect();
        let slow = || parts.iter().filter(|f| f.name != entry);
        let crossing: BTreeSet<String> = slow().flat_map(|f| f.results.iter().map(|r| r.name.clone())).collect();
        for function in &parts {
            let suffix = function.name.strip_prefix(entry).unwrap_or_default();
            let rate = match suffix {
                ".generation" => Rate::Generation,
                ".evaluation" => Rate::Evaluation,
                _ => rate,
            };
            let name = format!("{program}{suffix}");
            if self.programs.iter().any(|p| p.name == name) {
                return Err(CompileError::DuplicateProgram { name });
            }
            let inputs =
                function.params.iter().map(|p| (function.name_of(p.value).into(), function.ty(p.value).clone()));
            let outputs = function.results.iter().map(|r| (r.name.clone(), function.ty(r.value).clone()));
            self.programs.push(ProgramDraft {
                name,
                group,
                rate,
                function: indices[&function.name],
                inputs: inputs.collect(),
                outputs: outputs.collect(),
                whole: program.into(),
                crossing: crossing.clone(),
            });
        }
        Ok(())
    }

    /// Ends the plan.
    ///
    /// # Errors
    /// Slots that the target has no room for. A plan that does not verify is a bug of the compiler.
    pub fn finish(mut self, pipeline: Pipeline) -> Result<Plan, CompileError> {
        let mut states: Vec<State> = (0..self.groups.len()).map(|g| self.state(g)).collect::<Result<_, _>>()?;
        let mut programs = Vec::with_capacity(self.programs.len());
        for draft in &self.programs {
            programs.push(self.program(draft, &states[draft.group])?);
        }
        self.same_arenas_everywhere(&mut programs);
        let groups = self.groups.into_iter().zip(&mut states);
        let groups = groups.map(|(name, state)| Group { name, state_bytes: state.bytes }).collect();
        let plan = Plan {
            compiler: self.compiler,
            target: self.target,
            sources: self.sources,
            functions: self.functions,
            programs,
            groups,
            pipeline,
        };
        verify(&plan)?;
        Ok(plan)
    }

    /// Places everything that the programs of a group share.
    fn state(&self, group: usize) -> Result<State, CompileError> {
        let programs: Vec<&ProgramDraft> = self.programs.iter().filter(|p| p.group == group).collect();
        let mut state = State { offsets: BTreeMap::new(), bytes: 0 };
        for writer in &programs {
            for (name, ty) in &writer.outputs {
                let key = (writer.owner(name), name.clone(), ty.to_string());
                let is_read = programs.iter().any(|reader| {
                    reader.name != writer.name
                        && reader.owner(name) == key.0
                        && reader.inputs.iter().any(|(n, t)| n == name && t == ty)
                });
                if !is_read || state.offsets.contains_key(&key) {
                    continue;
                }
                let next = state.bytes.checked_add(ty.bytes() as u64);
                let next = next.and_then(|n| n.checked_next_multiple_of(self.target.alignment));
                state.offsets.insert(key, state.bytes);
                state.bytes = next.ok_or_else(|| CompileError::TooMuchMemory { function: writer.name.clone() })?;
            }
        }
        Ok(state)
    }

    fn program(&self, draft: &ProgramDraft, state: &State) -> Result<Program, CompileError> {
        let function = &self.functions[draft.function as usize];
        let frame = &function.frame_bytes;
        // The frame and the slots that are not state, all alive at once.
        let slots: Vec<&(String, TensorType)> = draft.inputs.iter().chain(&draft.outputs).collect();
        let is_input = |i: usize| i < draft.inputs.len();
        let mut state_places: Vec<Option<u64>> = slots.iter().map(|(n, ty)| state.find(draft, n, ty)).collect();
        // A program that reads and writes a name keeps its result apart from what it reads, unless it updates that in place.
        for i in draft.inputs.len()..slots.len() {
            let result = (i - draft.inputs.len()) as u32;
            let is_kept_apart = |j: usize| {
                state_places[j] == state_places[i] && !may_overwrite(&self.functions, draft.function, j as u32, result)
            };
            if state_places[i].is_some() && (0..slots.len()).any(|j| is_input(j) && is_kept_apart(j)) {
                state_places[i] = None;
            }
        }
        let mut blocks: Vec<Block> = Vec::new();
        for (a, &bytes) in frame.iter().enumerate() {
            blocks.push(Block { bytes, first: 0, last: 0, arena: Some(a as u32) });
        }
        for (_, ty) in slots.iter().zip(&state_places).filter(|(_, p)| p.is_none()).map(|(s, _)| s) {
            blocks.push(Block { bytes: ty.bytes() as u64, first: 0, last: 0, arena: None });
        }
        let limit = self.target.max_arena_bytes;
        let layout = memory::place(&blocks, self.target.alignment, limit).map_err(|e| match e {
            MemoryError::TooLarge(i) => {
                CompileError::BufferTooLarge { function: draft.name.clone(), bytes: blocks[i].bytes, limit }
            }
            MemoryError::Overflow => CompileError::TooMuchMemory { function: draft.name.clone() },
        })?;
        let mut next = frame.len();
        let mut placed = slots.iter().zip(&state_places).map(|((name, ty), in_state)| {
            let place = match *in_state {
                Some(offset) => SlotPlace::State { offset },
                None => {
                    let (arena, offset) = layout.places[next];
                    next += 1;
                    SlotPlace::Arena { arena, offset }
                }
            };
            Slot { name: name.clone(), ty: ty.clone(), place }
        });
        let inputs: Vec<Slot> = placed.by_ref().take(draft.inputs.len()).collect();
        let outputs: Vec<Slot> = placed.collect();
        Ok(Program {
            name: draft.name.clone(),
            group: draft.group as u32,
            rate: draft.rate,
            function: draft.function,
            inputs,
            outputs,
            frame: layout.places[..frame.len()].iter().map(|p| p.1).collect(),
            arena_bytes: layout.arena_bytes,
        })
    }

    /// Gives every function, call and program the same number of arenas.
    fn same_arenas_everywhere(&mut self, programs: &mut [Program]) {
        let of_functions = self.functions.iter().map(|f| f.frame_bytes.len());
        let arenas = of_functions.chain(programs.iter().map(|p| p.arena_bytes.len())).max().unwrap_or(0).max(1);
        for function in &mut self.functions {
            function.frame_bytes.resize(arenas, 0);
            for step in &mut function.steps {
                if let Step::Call(call) = step {
                    call.frame.resize(arenas, 0);
                }
            }
        }
        for program in programs {
            program.frame.resize(arenas, 0);
            program.arena_bytes.resize(arenas, 0);
        }
    }
}

impl ProgramDraft {
    /// Who a name belongs to: the program that was split for what crosses between its parts, else the group.
    fn owner(&self, name: &str) -> String {
        if self.crossing.contains(name) { self.whole.clone() } else { String::new() }
    }
}

/// The state of a group: offsets by owner, name and type.
struct State {
    offsets: BTreeMap<(String, String, String), u64>,
    bytes: u64,
}

impl State {
    fn find(&self, program: &ProgramDraft, name: &str, ty: &TensorType) -> Option<u64> {
        self.offsets.get(&(program.owner(name), name.into(), ty.to_string())).copied()
    }
}
