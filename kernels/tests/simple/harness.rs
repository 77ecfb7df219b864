//! Runs one kernel call in every way it may be called, and the graph it stands for.

use ltxc_ir::eval::{Data, Evaluator, Rounding, Tensor};
use ltxc_ir::ops::Unary;
use ltxc_ir::plan::{Kernel, Work};
use ltxc_ir::{Builder, DType, Module, Rate, TensorType, ValueId};
use ltxc_kernels::{catalogue, cpu};

/// Roundings that a division or a root counts as.
pub const DIVISION_ROUNDINGS: f64 = 1.0;

/// Sums of a reduction are f64: the error of one addition.
pub const SUM_ROUNDING: f64 = f64::EPSILON;

/// Roundings of a product and its addition to a sum, in units of f32.
pub fn product_roundings() -> f64 {
    1.0
}

/// Whether narrow floats are multiplied by matrix units.
pub fn has_matrix_units() -> bool {
    false
}

/// Units of the last place and absolute error of a function on f32: those of the tests of `math.rs`; library functions
/// have one unit.
pub fn accuracy(op: Unary) -> (f64, f64) {
    match op {
        Unary::Neg | Unary::Abs | Unary::Sqrt => (0.0, 0.0),
        Unary::Exp => (1.1, 0.0),
        Unary::Log | Unary::Rsqrt => (1.0, 0.0),
        Unary::Sin | Unary::Cos => (0.0, 1e-7),
        Unary::Tanh | Unary::Erf => (2.0, 0.0),
    }
}

/// Roundings of a power whose exponential has this argument.
pub fn power_roundings(_: f64) -> f64 {
    2.0
}

/// Random numbers from a written seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// In `lo..hi`.
    pub fn float(&mut self, lo: f64, hi: f64) -> f64 {
        lo + (hi - lo) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A tensor with values in `lo..hi` that its dtype can hold.
    pub fn tensor(&mut self, ty: &TensorType, lo: f64, hi: f64) -> Tensor {
        let n = ty.elements();
        let data = if ty.dtype.is_float() {
            Data::Float((0..n).map(|_| self.float(lo, hi)).collect())
        } else {
            Data::Int((0..n).map(|_| held(ty.dtype, self.float(lo, hi))).collect())
        };
        in_dtype(Tensor { ty: ty.clone(), data })
    }

    /// A tensor of whole numbers in `-most..=most`, clamped to what the dtype holds.
    pub fn whole(&mut self, ty: &TensorType, most: i64) -> Tensor {
        let mut t = self.tensor(ty, -(most as f64) - 0.5, most as f64 + 0.5);
        if let Data::Float(v) = &mut t.data {
            v.iter_mut().for_each(|x| *x = x.round());
        }
        in_dtype(t)
    }

    /// A shape of `rank` axes with odd, prime and unit extents, of at most `most` elements.
    pub fn shape(&mut self, rank: usize, most: usize) -> Vec<usize> {
        let mut room = most;
        (0..rank)
            .map(|_| {
                let d = self.pick(&[1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 97]).min(room);
                room /= d;
                d
            })
            .collect()
    }
}

fn held(dtype: DType, x: f64) -> i64 {
    let (lo, hi) = match dtype {
        DType::Bool => (0, 1),
        DType::U8 => (0, 255),
        DType::U32 => (0, u32::MAX as i64),
        DType::I8 => (-128, 127),
        _ => (i32::MIN as i64, i32::MAX as i64),
    };
    (x.floor() as i64).clamp(lo, hi)
}

/// The tensor after a way through memory, which rounds it to its dtype.
pub fn in_dtype(t: Tensor) -> Tensor {
    Tensor::from_bytes(t.ty.clone(), &t.to_bytes())
}

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

    fn ptr(&mut self) -> *mut u8 {
        self.words.as_mut_ptr().cast()
    }

    fn to_vec(&self) -> Vec<u8> {
        // SAFETY: the words hold at least these bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>(), self.bytes) }.to_vec()
    }
}

/// The result of a call on memory that held `before`; `in_place` is the operand that it lies on.
pub fn call(work: &Work, args: &[Tensor], before: &Tensor, in_place: Option<usize>, threads: usize) -> Vec<u8> {
    let ty = &before.ty;
    let mut operands: Vec<Memory> = args.iter().map(|a| Memory::new(&a.to_bytes())).collect();
    let mut result = Memory::new(&before.to_bytes());
    let types: Vec<&TensorType> = args.iter().map(|a| &a.ty).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let args: Vec<cpu::Arg> = types.iter().zip(&mut operands).map(|(&ty, m)| cpu::Arg { ty, ptr: m.ptr() }).collect();
    let ptr = in_place.map_or(result.ptr(), |i| args[i].ptr.cast_mut());
    let output = [cpu::Output { ty, ptr }];
    pool.install(|| {
        // Not zero and not aligned, as scratch may be.
        let mut workspace = vec![0xa5; catalogue::workspace_bytes(work, &types, &[ty], cpu::threads()) + 4];
        // SAFETY: the caller checked the types; the memory has them.
        unsafe { cpu::launch(work, &args, &output, &mut workspace[4..]) };
    });
    in_place.map_or(&result, |i| &operands[i]).to_vec()
}

/// Runs the call with one and two threads and in place wherever that is allowed; all must give the same bytes.
#[track_caller]
pub fn run_onto(kernel: &Kernel, args: &[Tensor], before: &Tensor) -> Tensor {
    let types: Vec<&TensorType> = args.iter().map(|a| &a.ty).collect();
    let work = Work::from(kernel.clone());
    work.check(&types, &[&before.ty]).unwrap();
    let bytes = call(&work, args, before, None, 1);
    assert!(call(&work, args, before, None, 2) == bytes, "{kernel:?} {types:?}: two threads differ from one");
    for i in (0..args.len()).filter(|&i| work.may_overwrite(i, 0) && args[i].ty == before.ty) {
        assert!(call(&work, args, before, Some(i), 2) == bytes, "{kernel:?} {types:?}: in place of {i} differs");
    }
    Tensor::from_bytes(before.ty.clone(), &bytes)
}

/// [`run_onto`] zeros.
#[track_caller]
pub fn run(kernel: &Kernel, args: &[Tensor], out: &TensorType) -> Tensor {
    run_onto(kernel, args, &Tensor::zeros(out.clone()))
}

/// Evaluates the graph that `build` makes of the operands. f32 results are not rounded.
pub fn reference(args: &[Tensor], build: impl Fn(&Builder, &[ValueId]) -> ValueId) -> Tensor {
    let b = Builder::new("main");
    let params: Vec<ValueId> =
        args.iter().enumerate().map(|(i, a)| b.param(&format!("x{i}"), a.ty.clone(), Rate::Step)).collect();
    b.result("y", build(&b, &params));
    let module = Module { functions: vec![b.finish().unwrap()], entries: vec!["main".into()] };
    let evaluator = Evaluator::new(&module, &|_, _, _| None).rounding(Rounding::Exact);
    evaluator.run("main", args).unwrap().remove(0)
}

/// Half the distance of neighbouring values of a dtype, relative to them.
pub fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        DType::F8E4M3 => 2f64.powi(-4),
        DType::F8E5M2 => 2f64.powi(-3),
        _ => 0.0,
    }
}

/// Least magnitude whose neighbours are that close: below, the distance stays the same.
fn smallest_normal(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-14),
        DType::F8E4M3 => 2f64.powi(-6),
        DType::F8E5M2 => 2f64.powi(-14),
        _ => 2f64.powi(-126),
    }
}

/// Compares with f64 values: `error(i)` is what f32 arithmetic may lose at element `i`; on top comes the rounding of the
/// result to its dtype, twice where the reference was rounded to it too.
#[track_caller]
pub fn close(found: &Tensor, want: &Tensor, error: impl Fn(usize) -> f64) {
    assert_eq!(found.ty, want.ty);
    if let (Data::Int(f), Data::Int(w)) = (&found.data, &want.data) {
        assert_eq!(f, w, "{}", found.ty);
    }
    let dtype = found.ty.dtype;
    let roundings = if dtype == DType::F32 { 1.0 } else { 2.0 };
    for (i, (&f, &w)) in found.floats().iter().zip(want.floats()).enumerate() {
        let same = f == w || (f.is_nan() && w.is_nan()) || (f.is_infinite() && w as f32 as f64 == f);
        let allowed = error(i) + roundings * unit(dtype) * w.abs().max(smallest_normal(dtype));
        assert!(same || (f - w).abs() <= allowed, "{} element {i}: {f:e}, expected {w:e} ± {allowed:e}", found.ty);
    }
}

/// Requires the same elements.
#[track_caller]
pub fn equal(found: &Tensor, want: &Tensor, what: &dyn std::fmt::Debug) {
    assert_eq!(found.ty, want.ty);
    let (found, want) = (found.to_bytes(), want.to_bytes());
    if let Some(at) = found.iter().zip(&want).position(|(f, w)| f != w) {
        panic!("{what:?}: byte {at} of {} is {}, expected {}", found.len(), found[at], want[at]);
    }
}
