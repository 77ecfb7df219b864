//! Makes fused calls part by part, and runs them in every way.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Binary, Gather, Unary};
use ltxc_ir::plan::{Fused, Kernel, Map, MapFunction, MapStep, Part, PartArg, Source, Work};
use ltxc_ir::{DType, TensorType};
use ltxc_kernels::{catalogue, cpu};

use crate::harness::Random;

/// Memory aligned for every dtype.
struct Memory {
    words: Vec<u64>,
    bytes: usize,
}

impl Memory {
    fn new(bytes: &[u8]) -> Memory {
        let mut memory = Memory { words: vec![0; bytes.len().div_ceil(8)], bytes: bytes.len() };
        // SAFETY: there is room for the bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.ptr(), bytes.len()) };
        memory
    }

    fn filled(byte: u8, bytes: usize) -> Memory {
        Memory { words: vec![u64::from_ne_bytes([byte; 8]); bytes.div_ceil(8)], bytes }
    }

    fn ptr(&mut self) -> *mut u8 {
        self.words.as_mut_ptr().cast()
    }

    fn to_vec(&self) -> Vec<u8> {
        // SAFETY: the words hold at least these bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>(), self.bytes) }.to_vec()
    }
}

/// Results of a call on operands of these types and bytes. `in_place` says which result lies on which operand.
fn call(
    work: &Work,
    args: &[(&TensorType, &[u8])],
    results: &[&TensorType],
    in_place: Option<(usize, usize)>,
    threads: usize,
) -> Vec<Vec<u8>> {
    let mut operands: Vec<Memory> = args.iter().map(|(_, bytes)| Memory::new(bytes)).collect();
    // Results hold something else before.
    let mut outputs: Vec<Memory> = results.iter().map(|ty| Memory::filled(0x3c, ty.bytes())).collect();
    let operand_pointers: Vec<*mut u8> = operands.iter_mut().map(Memory::ptr).collect();
    let mut pointers: Vec<*mut u8> = outputs.iter_mut().map(Memory::ptr).collect();
    if let Some((arg, result)) = in_place {
        pointers[result] = operand_pointers[arg];
    }
    let types: Vec<&TensorType> = args.iter().map(|(ty, _)| *ty).collect();
    let args: Vec<cpu::Arg> =
        types.iter().zip(&operand_pointers).map(|(&ty, &ptr)| cpu::Arg { ty, ptr: ptr.cast_const() }).collect();
    let outs: Vec<cpu::Output> = results.iter().zip(&pointers).map(|(&ty, &ptr)| cpu::Output { ty, ptr }).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        // Not zero and not aligned, as scratch may be.
        let mut workspace = vec![0xa5; catalogue::workspace_bytes(work, &types, results, cpu::threads()) + 4];
        // SAFETY: the caller checked the types; the memory has them.
        unsafe { cpu::launch(work, &args, &outs, &mut workspace[4..]) };
    });
    let mut found: Vec<Vec<u8>> = outputs.iter().map(Memory::to_vec).collect();
    if let Some((arg, result)) = in_place {
        found[result] = operands[arg].to_vec();
    }
    found
}

/// A fused call that is being made.
#[derive(Clone, Debug)]
pub struct Group {
    pub args: Vec<Tensor>,
    pub parts: Vec<Part>,
    pub stored: Vec<u32>,
}

impl Group {
    pub fn new() -> Group {
        Group { args: Vec::new(), parts: Vec::new(), stored: Vec::new() }
    }

    /// A new operand.
    pub fn operand(&mut self, tensor: Tensor) -> PartArg {
        self.args.push(tensor);
        let i = self.args.len() - 1;
        PartArg { source: Source::Operand(i as u32), ty: self.args[i].ty.clone() }
    }

    /// A new part; gives it as an operand of others.
    pub fn part(&mut self, kernel: impl Into<Kernel>, args: Vec<PartArg>, result: TensorType) -> PartArg {
        self.parts.push(Part { kernel: kernel.into(), args, result: result.clone() });
        PartArg { source: Source::Part(self.parts.len() as u32 - 1), ty: result }
    }

    /// Stores a part.
    pub fn store(&mut self, part: &PartArg) {
        let Source::Part(p) = part.source else { panic!("only parts are stored") };
        if !self.stored.contains(&p) {
            self.stored.push(p);
        }
    }

    pub fn fused(&self) -> Fused {
        Fused { pattern: "test".into(), parts: self.parts.clone(), stored: self.stored.clone() }
    }

    fn results(&self) -> Vec<&TensorType> {
        self.stored.iter().map(|&s| &self.parts[s as usize].result).collect()
    }

    fn types(&self) -> Vec<&TensorType> {
        self.args.iter().map(|a| &a.ty).collect()
    }

    /// What the parts give, each run by its own kernel.
    pub fn one_after_the_other(&self) -> Vec<Vec<u8>> {
        let args: Vec<Vec<u8>> = self.args.iter().map(Tensor::to_bytes).collect();
        let mut made: Vec<Vec<u8>> = Vec::new();
        for part in &self.parts {
            let operands = part.args.iter().map(|a| match a.source {
                Source::Operand(i) => (&a.ty, &args[i as usize][..]),
                Source::Part(p) => (&a.ty, &made[p as usize][..]),
            });
            let operands: Vec<(&TensorType, &[u8])> = operands.collect();
            let work = Work::from(part.kernel.clone());
            let mut results = call(&work, &operands, &[&part.result], None, 2);
            made.push(results.remove(0));
        }
        self.stored.iter().map(|&s| made[s as usize].clone()).collect()
    }

    /// Runs it in every way that is allowed; `None` if it has no form.
    #[track_caller]
    pub fn run(&self) -> Option<Vec<Vec<u8>>> {
        let work = Work::from(self.fused());
        let (types, results) = (self.types(), self.results());
        work.check(&types, &results).ok()?;
        let bytes: Vec<Vec<u8>> = self.args.iter().map(Tensor::to_bytes).collect();
        let args: Vec<(&TensorType, &[u8])> = types.iter().zip(&bytes).map(|(&ty, b)| (ty, &b[..])).collect();
        let found = call(&work, &args, &results, None, 1);
        assert!(call(&work, &args, &results, None, 2) == found, "two threads differ from one: {:?}", self.outline());
        for (a, ty) in types.iter().enumerate() {
            for (r, result) in results.iter().enumerate() {
                if work.may_overwrite(a, r) && ty == result {
                    let again = call(&work, &args, &results, Some((a, r)), 2);
                    assert!(again == found, "result {r} in place of {a} differs: {:?}", self.outline());
                }
            }
        }
        Some(found)
    }

    /// Compares with the parts one after the other; gives false if it has no form.
    #[track_caller]
    pub fn check(&self) -> bool {
        let Some(found) = self.run() else { return false };
        for (r, (found, want)) in found.iter().zip(self.one_after_the_other()).enumerate() {
            if let Some(at) = found.iter().zip(&want).position(|(f, w)| f != w) {
                panic!("result {r}, byte {at} of {}: {:?}", found.len(), self.outline());
            }
        }
        true
    }

    /// Everything but the values.
    fn outline(&self) -> (Vec<&TensorType>, &[Part], &[u32]) {
        (self.types(), &self.parts, &self.stored)
    }

    /// Bytes of scratch that it needs on one thread.
    #[track_caller]
    pub fn workspace(&self) -> usize {
        Work::from(self.fused()).check(&self.types(), &self.results()).unwrap();
        catalogue::workspace_bytes(&self.fused().into(), &self.types(), &self.results(), 1)
    }

    /// Maps behind `from`, whose result has rows of `n` elements: up to four, with operands of all kinds. Stores some.
    pub fn tail(&mut self, random: &mut Random, from: PartArg, dtypes: &[DType]) -> PartArg {
        let mut last = from;
        let most = if last.ty.elements() == 0 { 1 } else { 5 };
        for _ in 0..random.below(most) {
            if random.below(4) == 0 {
                self.store(&last);
            }
            last = self.map(random, &last, dtypes);
        }
        last
    }

    fn map(&mut self, random: &mut Random, x: &PartArg, dtypes: &[DType]) -> PartArg {
        let (rank, dtype) = (x.ty.rank(), random.pick(dtypes));
        let space = x.ty.elements();
        // Another view of the same elements, which the rows of the tail survive.
        let shape = match random.below(3) {
            0 if rank > 1 => vec![x.ty.shape[..rank - 1].iter().product(), x.ty.shape[rank - 1]],
            1 if x.ty.shape[rank - 1].is_multiple_of(2) && rank < 5 => {
                [&x.ty.shape[..rank - 1], &[x.ty.shape[rank - 1] / 2, 2]].concat()
            }
            _ => x.ty.shape.clone(),
        };
        let result = TensorType::new(dtype, shape.clone());
        let mut args = vec![PartArg { source: x.source, ty: TensorType::new(x.ty.dtype, shape.clone()) }];
        let other = random.pick(dtypes);
        let n = shape.len() - 1;
        match random.below(8) {
            0 | 1 => args.push(self.operand(random.tensor(&TensorType::new(other, shape[n..].to_vec()), -1.0, 1.0))),
            2 | 3 => args.push(self.operand(random.tensor(&TensorType::new(other, shape.clone()), -1.0, 1.0))),
            4 => {
                let per_row = [&shape[..n], &[1]].concat();
                args.push(self.operand(random.tensor(&TensorType::new(other, per_row), -1.0, 1.0)));
            }
            5 => args.push(self.operand(random.tensor(&TensorType::new(other, vec![]), -1.0, 1.0))),
            6 => {
                let (rows, length) = (shape[0], space / shape[0]);
                let table = [&[3], &shape[1..]].concat();
                let table = self.operand(random.tensor(&TensorType::new(other, table), -1.0, 1.0));
                let index = self.operand(random.tensor(&TensorType::new(DType::I32, vec![rows]), -2.0, 5.0));
                assert_eq!(rows * length, space);
                let gathered = TensorType::new(other, shape);
                args.push(self.part(Kernel::Gather(Gather { axis: 0 }), vec![table, index], gathered));
            }
            _ => {}
        }
        let mut steps = Vec::new();
        let registers = args.len() as u32;
        let mut top = 0;
        if registers > 1 {
            let op = random.pick(&[Binary::Add, Binary::Mul, Binary::Sub, Binary::Max]);
            steps.push(MapStep::Binary(op, 0, 1));
            top = registers;
        }
        match random.below(5) {
            0 => steps.push(MapStep::Function(MapFunction::Gelu, top)),
            1 => steps.push(MapStep::Function(MapFunction::Silu, top)),
            2 => steps.push(MapStep::Unary(Unary::Neg, top)),
            3 => steps.push(MapStep::Round(DType::BF16, top)),
            _ => {}
        }
        self.part(Kernel::Map(Map { steps }), args, result)
    }
}

/// The result type of a kernel.
pub fn infer<T: ltxc_ir::ops::OpDef>(op: &T, args: &[&PartArg]) -> Option<TensorType> {
    op.infer(&args.iter().map(|a| &a.ty).collect::<Vec<_>>()).ok()
}
