//! The steps of a `map` on blocks of lanes: f32 if anything is floating point, else i64. A block is rows at a fixed distance,
//! so that a few columns of a wide tensor need one call.

use std::marker::PhantomData;

use half::bf16;
use ltxc_ir::DType;
use ltxc_ir::ops::{Binary, Compare, Unary};
use ltxc_ir::plan::{MapFunction as Function, MapStep};

use super::map::BLOCK;
use super::simd::multiversion;
use super::{element, math};

/// What a register of a `map` holds.
pub(crate) trait Lane: Copy + Sync + 'static {
    /// The dtype whose elements are lanes in memory.
    const DTYPE: Option<DType>;

    /// Reads `dst.len()` elements.
    ///
    /// # Safety
    /// As for [`element::load`].
    unsafe fn load(dtype: DType, src: *const u8, dst: &mut [Self]);

    /// Writes the lanes in `dtype`.
    ///
    /// # Safety
    /// As for [`element::store`].
    unsafe fn store(dtype: DType, src: &[Self], dst: *mut u8);

    /// Runs a step: `at` gives the registers it reads, with the rows and columns of `dst`, which are [`BLOCK`] lanes at most.
    fn step<'a>(step: &MapStep, at: impl Fn(u32) -> Rows<'a, Self>, dst: RowsMut<'_, Self>);
}

/// Rows of lanes that are read.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    first: *const T,
    /// From row to row, in lanes.
    step: usize,
    rows: usize,
    columns: usize,
    lanes: PhantomData<&'a [T]>,
}

impl<'a, T> Rows<'a, T> {
    /// # Safety
    /// The rows are valid, and nothing writes to them while the result lives.
    pub(crate) unsafe fn new(first: *const T, step: usize, rows: usize, columns: usize) -> Rows<'a, T> {
        Rows { first, step, rows, columns, lanes: PhantomData }
    }

    #[inline(always)]
    fn row(&self, r: usize) -> &'a [T] {
        debug_assert!(r < self.rows);
        // SAFETY: the promise of `new`.
        unsafe { std::slice::from_raw_parts(self.first.wrapping_add(r * self.step), self.columns) }
    }

    /// The rows one by one.
    #[inline(always)]
    fn each(self) -> impl Iterator<Item = &'a [T]> {
        (0..self.rows).map(move |r| self.row(r))
    }
}

/// Rows of lanes that are written.
pub(crate) struct RowsMut<'a, T> {
    first: *mut T,
    step: usize,
    rows: usize,
    columns: usize,
    lanes: PhantomData<&'a mut [T]>,
}

impl<'a, T> RowsMut<'a, T> {
    /// # Safety
    /// The rows are valid and do not overlap, and nothing else uses them while the result lives.
    pub(crate) unsafe fn new(first: *mut T, step: usize, rows: usize, columns: usize) -> RowsMut<'a, T> {
        RowsMut { first, step, rows, columns, lanes: PhantomData }
    }

    /// The rows one by one.
    #[inline(always)]
    fn each(self) -> impl Iterator<Item = &'a mut [T]> {
        // SAFETY: the promise of `new`; every row is given out once.
        (0..self.rows).map(move |r| unsafe {
            std::slice::from_raw_parts_mut(self.first.wrapping_add(r * self.step), self.columns)
        })
    }
}

impl Lane for f32 {
    const DTYPE: Option<DType> = Some(DType::F32);

    #[inline]
    unsafe fn load(dtype: DType, src: *const u8, dst: &mut [f32]) {
        // Operands of one or few elements are common, and not worth the way to vectorised code.
        if dst.len() < 8 && matches!(dtype, DType::F32 | DType::BF16) {
            for (i, d) in dst.iter_mut().enumerate() {
                // SAFETY: the caller promises as many elements of the dtype.
                *d = unsafe {
                    match dtype {
                        DType::F32 => *src.cast::<f32>().add(i),
                        _ => element::bf16_to_f32(*src.cast::<bf16>().add(i)),
                    }
                };
            }
            return;
        }
        // SAFETY: passed on to the caller.
        unsafe { element::load(dtype, src, dst) }
    }

    unsafe fn store(dtype: DType, src: &[f32], dst: *mut u8) {
        // SAFETY: passed on to the caller.
        unsafe { element::store(dtype, src, dst) }
    }

    fn step<'a>(step: &MapStep, at: impl Fn(u32) -> Rows<'a, f32>, dst: RowsMut<'_, f32>) {
        match *step {
            MapStep::Scalar(v) => dst.each().for_each(|row| row.fill(v.0 as f32)),
            MapStep::Unary(op, a) => unary(op, at(a), dst),
            MapStep::Binary(op, a, b) => binary(op, at(a), at(b), dst),
            MapStep::Compare(op, a, b) => match op {
                Compare::Equal => apply2(Equal, at(a), at(b), dst),
                Compare::Less => apply2(Less, at(a), at(b), dst),
                Compare::LessEqual => apply2(LessEqual, at(a), at(b), dst),
            },
            MapStep::Select(c, a, b) => apply3(Select, at(c), at(a), at(b), dst),
            MapStep::Function(f, a) => match f {
                Function::Sigmoid => apply1(Sigmoid, at(a), dst),
                Function::Silu => apply1(Silu, at(a), dst),
                Function::Gelu => apply1(Gelu, at(a), dst),
                Function::LeakyRelu(slope) => apply1(LeakyRelu(slope.0 as f32), at(a), dst),
            },
            MapStep::Snake(x, a, b) => {
                for (((dst, x), a), b) in dst.each().zip(at(x).each()).zip(at(a).each()).zip(at(b).each()) {
                    apply3(Snake, one(x), one(a), one(b), one_mut(dst));
                    for (i, d) in dst.iter_mut().enumerate() {
                        if beyond_trigonometry(x[i] * a[i]) {
                            *d = snake(x[i], (x[i] * a[i]).sin(), b[i]);
                        }
                    }
                }
            }
            MapStep::Round(dtype, a) => dst.each().zip(at(a).each()).for_each(|(dst, x)| round(dtype, x, dst)),
        }
    }
}

/// A slice as one row.
fn one(x: &[f32]) -> Rows<'_, f32> {
    // SAFETY: the lanes are those of the slice.
    unsafe { Rows::new(x.as_ptr(), 0, 1, x.len()) }
}

/// A slice as one row that is written.
fn one_mut(x: &mut [f32]) -> RowsMut<'_, f32> {
    // SAFETY: the lanes are those of the slice.
    unsafe { RowsMut::new(x.as_mut_ptr(), 0, 1, x.len()) }
}

fn unary(op: Unary, x: Rows<'_, f32>, dst: RowsMut<'_, f32>) {
    match op {
        Unary::Neg => apply1(Neg, x, dst),
        Unary::Abs => apply1(Abs, x, dst),
        Unary::Exp => apply1(Exp, x, dst),
        Unary::Log => dst.each().zip(x.each()).for_each(|(dst, x)| each(x, dst, f32::ln)),
        Unary::Sqrt => apply1(Sqrt, x, dst),
        Unary::Rsqrt => apply1(Rsqrt, x, dst),
        Unary::Sin => trigonometry(Sin, f32::sin, x, dst),
        Unary::Cos => trigonometry(Cos, f32::cos, x, dst),
        Unary::Tanh => apply1(Tanh, x, dst),
        Unary::Erf => apply1(Erf, x, dst),
    }
}

fn binary(op: Binary, a: Rows<'_, f32>, b: Rows<'_, f32>, dst: RowsMut<'_, f32>) {
    match op {
        Binary::Add => apply2(Add, a, b, dst),
        Binary::Sub => apply2(Sub, a, b, dst),
        Binary::Mul => apply2(Mul, a, b, dst),
        Binary::Div => apply2(Div, a, b, dst),
        Binary::Max => apply2(Max, a, b, dst),
        Binary::Min => apply2(Min, a, b, dst),
        Binary::Pow => {
            for ((dst, a), b) in dst.each().zip(a.each()).zip(b.each()) {
                each2(a, b, dst, f32::powf);
            }
        }
    }
}

/// Rounds to `dtype` and back.
fn round(dtype: DType, x: &[f32], dst: &mut [f32]) {
    match dtype {
        DType::F32 => dst.copy_from_slice(x),
        _ => {
            let mut narrow = [0u32; BLOCK];
            // SAFETY: no dtype is wider than `u32`, and a block is at most this long.
            unsafe {
                element::store(dtype, x, narrow.as_mut_ptr().cast());
                element::load(dtype, narrow.as_ptr().cast(), dst);
            }
        }
    }
}

fn beyond_trigonometry(x: f32) -> bool {
    x.abs() > math::TRIG_LIMIT
}

/// The vectorised function, and `exact` for what it cannot compute: arguments of more than a million.
fn trigonometry(f: impl Function1, exact: impl Fn(f32) -> f32, x: Rows<'_, f32>, dst: RowsMut<'_, f32>) {
    for (dst, x) in dst.each().zip(x.each()) {
        apply1(f, one(x), one_mut(dst));
        for (d, &x) in dst.iter_mut().zip(x) {
            if beyond_trigonometry(x) {
                *d = exact(x);
            }
        }
    }
}

#[inline(always)]
fn snake(x: f32, sine: f32, b: f32) -> f32 {
    x + sine * sine / (b + 1e-9)
}

fn each<T: Copy, U>(x: &[T], dst: &mut [U], f: impl Fn(T) -> U) {
    for (d, &x) in dst.iter_mut().zip(x) {
        *d = f(x);
    }
}

/// A function of one lane. A type of its own, so that it is compiled into the loop of each instruction set.
trait Function1: Copy {
    fn of(self, x: f32) -> f32;
}

/// A function of two lanes.
trait Function2: Copy {
    fn of(self, a: f32, b: f32) -> f32;
}

/// A function of three lanes.
trait Function3: Copy {
    fn of(self, a: f32, b: f32, c: f32) -> f32;
}

multiversion! {
    fn apply1<F: Function1>(f: F, x: Rows<'_, f32>, dst: RowsMut<'_, f32>) {
        for (dst, x) in dst.each().zip(x.each()) {
            for (d, &x) in dst.iter_mut().zip(x) {
                *d = f.of(x);
            }
        }
    }
}

multiversion! {
    fn apply2<F: Function2>(f: F, a: Rows<'_, f32>, b: Rows<'_, f32>, dst: RowsMut<'_, f32>) {
        for ((dst, a), b) in dst.each().zip(a.each()).zip(b.each()) {
            for ((d, &a), &b) in dst.iter_mut().zip(a).zip(b) {
                *d = f.of(a, b);
            }
        }
    }
}

multiversion! {
    fn apply3<F: Function3>(f: F, a: Rows<'_, f32>, b: Rows<'_, f32>, c: Rows<'_, f32>, dst: RowsMut<'_, f32>) {
        for (((dst, a), b), c) in dst.each().zip(a.each()).zip(b.each()).zip(c.each()) {
            for (((d, &a), &b), &c) in dst.iter_mut().zip(a).zip(b).zip(c) {
                *d = f.of(a, b, c);
            }
        }
    }
}

macro_rules! functions {
    ($trait:ident { $($name:ident($($x:ident),*) => $body:expr),* $(,)? }) => {
        $(
            #[derive(Clone, Copy)]
            struct $name;
            impl $trait for $name {
                #[inline(always)]
                fn of(self, $($x: f32),*) -> f32 {
                    $body
                }
            }
        )*
    };
}

functions!(Function1 {
    Neg(x) => -x,
    Abs(x) => x.abs(),
    Exp(x) => math::exp(x),
    Sqrt(x) => x.sqrt(),
    Rsqrt(x) => 1.0 / x.sqrt(),
    Sin(x) => math::sin(x),
    Cos(x) => math::cos(x),
    Tanh(x) => math::tanh(x),
    Erf(x) => math::erf(x),
    Sigmoid(x) => math::sigmoid(x),
    Silu(x) => math::silu(x),
    Gelu(x) => math::gelu(x),
});

functions!(Function2 {
    Add(a, b) => a + b,
    Sub(a, b) => a - b,
    Mul(a, b) => a * b,
    Div(a, b) => a / b,
    // NaN survives on either side, unlike in f32::max.
    Max(a, b) => if a > b || a.is_nan() { a } else { b },
    Min(a, b) => if a < b || a.is_nan() { a } else { b },
    Equal(a, b) => truth(a == b),
    Less(a, b) => truth(a < b),
    LessEqual(a, b) => truth(a <= b),
});

functions!(Function3 {
    Select(a, b, c) => if a != 0.0 { b } else { c },
    Snake(a, b, c) => snake(a, math::sin(a * b), c),
});

#[derive(Clone, Copy)]
struct LeakyRelu(f32);

impl Function1 for LeakyRelu {
    #[inline(always)]
    fn of(self, x: f32) -> f32 {
        math::leaky_relu(x, self.0)
    }
}

#[inline(always)]
fn truth(holds: bool) -> f32 {
    holds as u8 as f32
}

impl Lane for i64 {
    const DTYPE: Option<DType> = None;

    unsafe fn load(dtype: DType, src: *const u8, dst: &mut [i64]) {
        // SAFETY: passed on to the caller; a `map` with integer lanes has no floating point operands.
        unsafe { element::load_int(dtype, src, dst) }
    }

    unsafe fn store(dtype: DType, src: &[i64], dst: *mut u8) {
        // SAFETY: as above.
        unsafe { element::store_int(dtype, src, dst) }
    }

    fn step<'a>(step: &MapStep, at: impl Fn(u32) -> Rows<'a, i64>, dst: RowsMut<'_, i64>) {
        for (r, dst) in dst.each().enumerate() {
            integers(step, |register| at(register).row(r), dst);
        }
    }
}

/// A step on a row of integers.
fn integers<'a>(step: &MapStep, at: impl Fn(u32) -> &'a [i64], dst: &mut [i64]) {
    match *step {
        MapStep::Scalar(v) => dst.fill(v.0 as i64),
        MapStep::Unary(Unary::Neg, a) => each(at(a), dst, i64::wrapping_neg),
        MapStep::Unary(Unary::Abs, a) => each(at(a), dst, i64::wrapping_abs),
        MapStep::Binary(op, a, b) => {
            let (a, b) = (at(a), at(b));
            match op {
                Binary::Add => each2(a, b, dst, i64::wrapping_add),
                Binary::Sub => each2(a, b, dst, i64::wrapping_sub),
                Binary::Mul => each2(a, b, dst, i64::wrapping_mul),
                // Division by zero has no integer result; the reference says 0.
                Binary::Div => each2(a, b, dst, |a, b| a.checked_div(b).unwrap_or(0)),
                Binary::Max => each2(a, b, dst, i64::max),
                Binary::Min => each2(a, b, dst, i64::min),
                Binary::Pow => each2(a, b, dst, |a, b| a.wrapping_pow(b.clamp(0, 63) as u32)),
            }
        }
        MapStep::Compare(op, a, b) => {
            let (a, b) = (at(a), at(b));
            match op {
                Compare::Equal => each2(a, b, dst, |a, b| (a == b) as i64),
                Compare::Less => each2(a, b, dst, |a, b| (a < b) as i64),
                Compare::LessEqual => each2(a, b, dst, |a, b| (a <= b) as i64),
            }
        }
        MapStep::Select(c, a, b) => {
            let (c, a, b) = (at(c), at(a), at(b));
            for (i, d) in dst.iter_mut().enumerate() {
                *d = if c[i] != 0 { a[i] } else { b[i] };
            }
        }
        // No graph asks for the rest on integers, but a plan from elsewhere may: the nearest thing is the function on
        // floats.
        MapStep::Unary(..) | MapStep::Function(..) | MapStep::Snake(..) | MapStep::Round(..) => {
            through_floats(step, at, dst);
        }
    }
}

fn each2<T: Copy>(a: &[T], b: &[T], dst: &mut [T], f: impl Fn(T, T) -> T) {
    for ((d, &a), &b) in dst.iter_mut().zip(a).zip(b) {
        *d = f(a, b);
    }
}

/// Runs a step on the lanes as f32, and truncates what it gives.
fn through_floats<'a>(step: &MapStep, at: impl Fn(u32) -> &'a [i64], dst: &mut [i64]) {
    let n = dst.len();
    let mut operands = [[0f32; BLOCK]; 3];
    let registers = step.registers();
    for (wide, &r) in operands.iter_mut().zip(&registers) {
        each(at(r), &mut wide[..n], |v| v as f32);
    }
    let mut result = [0f32; BLOCK];
    let find = |r: u32| one(&operands[registers.iter().position(|&x| x == r).unwrap_or(0)][..n]);
    <f32 as Lane>::step(step, find, one_mut(&mut result[..n]));
    each(&result[..n], dst, |v| v as i64);
}
