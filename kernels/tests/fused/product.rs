//! Products with pads in front, maps behind and stores that rearrange.

use ltxc_ir::ops::{Binary, Conv, ConvTranspose, Matmul, Pad, PadMode};
use ltxc_ir::plan::{Copy, Kernel, Map, MapFunction, MapStep, PartArg, Work};
use ltxc_ir::{DType, Float, TensorType};

use crate::group::{Group, infer};
use crate::harness::Random;

const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn tensor(group: &mut Group, random: &mut Random, dtype: DType, shape: Vec<usize>) -> PartArg {
    group.operand(random.tensor(&TensorType::new(dtype, shape), -1.0, 1.0))
}

fn matmul(group: &mut Group, random: &mut Random, shape: [usize; 3], batch: &[usize]) -> PartArg {
    let [m, n, k] = shape;
    let (a_type, b_type) = (random.pick(&FLOATS), random.pick(&FLOATS));
    let transpose_rhs = random.below(2) == 0;
    let a = tensor(group, random, a_type, [batch, &[m, k]].concat());
    let b_shape = if transpose_rhs { vec![n, k] } else { vec![k, n] };
    let b_batch: &[usize] = if random.below(2) == 0 { batch } else { &[] };
    let b = tensor(group, random, b_type, [b_batch, &b_shape].concat());
    let op = Matmul { transpose_rhs };
    let result = infer(&op, &[&a, &b]).expect("extents fit");
    group.part(Kernel::Matmul(op), vec![a, b], result)
}

/// A leaky ReLU of a tensor.
fn leaky(group: &mut Group, x: PartArg, slope: f64) -> PartArg {
    let map = Map { steps: vec![MapStep::Function(MapFunction::LeakyRelu(Float(slope)), 0)] };
    let ty = x.ty.clone();
    group.part(Kernel::Map(map), vec![x], ty)
}

/// Pads of a tensor, one after the other; `None` where a mode does not allow the amount.
fn pads(group: &mut Group, random: &mut Random, mut x: PartArg, spatial: std::ops::Range<usize>) -> Option<PartArg> {
    for _ in 0..random.below(4) {
        let mode = random.pick(&[PadMode::Zeros, PadMode::Edge, PadMode::Reflect, PadMode::Circular]);
        let mut amounts = || {
            let amount = |a: usize| if spatial.contains(&a) { random.pick(&[0, 0, 1, 2, 3]) } else { 0 };
            (0..x.ty.rank()).map(amount).collect::<Vec<_>>()
        };
        let op = Pad { lo: amounts(), hi: amounts(), mode };
        let result = infer(&op, &[&x])?;
        x = group.part(Kernel::Pad(op), vec![x], result);
    }
    Some(x)
}

fn conv(group: &mut Group, random: &mut Random) -> Option<PartArg> {
    let n = 1 + random.below(3);
    let most = [90, 14, 7][n - 1];
    let mut each = |from: &[usize]| (0..n).map(|_| random.pick(from)).collect::<Vec<_>>();
    let (input, kernel) = (each(&[1, 2, 5, 11, most]), each(&[1, 2, 3, 3, 5]));
    let (stride, dilation) = (each(&[1, 1, 1, 2, 3]), each(&[1, 1, 1, 2]));
    let pad: Vec<(usize, usize)> = each(&[0, 0, 1, 2]).into_iter().zip(each(&[0, 0, 1, 3])).collect();
    let (groups, (ci, co)) = match random.below(4) {
        0 => (random.pick(&[1, 3, 8, 40]), (1, 1)),
        1 => (2, random.pick(&[(3, 5), (4, 34)])),
        _ => (1, random.pick(&[(1, 1), (4, 40), (7, 5), (12, 160), (70, 33)])),
    };
    let (x_type, w_type) = (random.pick(&FLOATS), random.pick(&FLOATS));
    let batch = random.pick(&[1, 1, 2]);
    let mut x = tensor(group, random, x_type, [&[batch], &input[..], &[groups * ci]].concat());
    if random.below(3) == 0 {
        x = leaky(group, x, random.pick(&[0.1, 0.01, -0.3, 2.0]));
    }
    // Pads of batch or channels are rare, but allowed.
    let spatial = if random.below(8) == 0 { 0..n + 2 } else { 1..n + 1 };
    let x = pads(group, random, x, spatial)?;
    let channels = x.ty.shape[n + 1];
    if channels % groups != 0 {
        return None;
    }
    let w = tensor(group, random, w_type, [&kernel[..], &[channels / groups, groups * co]].concat());
    if random.below(3) == 0 {
        let op = ConvTranspose { stride, dilation, pad, groups };
        let result = infer(&op, &[&x, &w])?;
        return Some(group.part(Kernel::ConvTranspose(op), vec![x, w], result));
    }
    let op = Conv { stride, dilation, pad, groups };
    let result = infer(&op, &[&x, &w])?;
    Some(group.part(Kernel::Conv(op), vec![x, w], result))
}

/// Row-major strides.
fn strides(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|a| shape[a + 1..].iter().product()).collect()
}

/// Copies that store `x` in parts or rearranged.
fn stores(group: &mut Group, random: &mut Random, x: &PartArg) {
    let n = x.ty.rank() - 1;
    let (rows, channels): (usize, usize) = (x.ty.shape[..n].iter().product(), x.ty.shape[n]);
    match random.below(4) {
        // Cut along channels.
        0 if channels > 1 => {
            let cut = 1 + random.below(channels - 1);
            for part in [0..cut, cut..channels] {
                let copy = Copy {
                    shape: vec![rows, part.len()],
                    src_offset: part.start,
                    src_strides: vec![channels, 1],
                    dst_offset: 0,
                    dst_strides: vec![part.len(), 1],
                };
                let ty = TensorType::new(x.ty.dtype, vec![rows, part.len()]);
                let part = group.part(Kernel::Copy(copy), vec![x.clone()], ty);
                group.store(&part);
            }
        }
        // All axes in any order, channels as two; perhaps without the first rows.
        _ => {
            let inner = [2, 3, 4, 8].into_iter().find(|&f| channels % f == 0).unwrap_or(1);
            let mut shape = [&x.ty.shape[..n], &[channels / inner, inner]].concat();
            let src = strides(&shape);
            let mut src_offset = 0;
            if random.below(3) == 0 && shape[0] > 1 {
                (src_offset, shape[0]) = (src[0], shape[0] - 1);
            }
            let mut order: Vec<usize> = (0..shape.len()).collect();
            (1..order.len()).rev().for_each(|i| order.swap(i, random.below(i + 1)));
            let moved: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
            let copy = Copy {
                src_offset,
                src_strides: order.iter().map(|&a| src[a]).collect(),
                dst_offset: 0,
                dst_strides: strides(&moved),
                shape: moved.clone(),
            };
            let part = group.part(Kernel::Copy(copy), vec![x.clone()], TensorType::new(x.ty.dtype, moved));
            group.store(&part);
        }
    }
}

fn finish(mut group: Group, random: &mut Random, anchor: PartArg) -> bool {
    let last = group.tail(random, anchor, &FLOATS);
    if random.below(3) == 0 {
        stores(&mut group, random, &last);
    } else {
        group.store(&last);
    }
    group.check()
}

#[test]
fn random_matmuls_match() {
    let mut random = Random(11);
    let mut checked = 0;
    for _ in 0..400 {
        let mut group = Group::new();
        let shape = [
            random.pick(&[1, 2, 5, 6, 7, 13, 61, 100]),
            random.pick(&[1, 2, 31, 64, 97, 130, 300]),
            random.pick(&[0, 1, 3, 40, 193, 400]),
        ];
        let batch = random.pick(&[&[][..], &[], &[1], &[3], &[2, 2]]);
        let anchor = matmul(&mut group, &mut random, shape, batch);
        checked += usize::from(finish(group, &mut random, anchor));
    }
    assert!(checked > 300, "{checked} cases are accepted");
}

#[test]
fn random_convolutions_match() {
    let mut random = Random(12);
    let mut checked = 0;
    for _ in 0..700 {
        let mut group = Group::new();
        let Some(anchor) = conv(&mut group, &mut random) else { continue };
        checked += usize::from(finish(group, &mut random, anchor));
    }
    assert!(checked > 300, "{checked} cases are accepted");
}

/// Other elements of the result still need what is read through a leaky ReLU.
#[test]
fn an_activated_operand_is_not_overwritten() {
    let mut random = Random(15);
    let mut group = Group::new();
    let x = tensor(&mut group, &mut random, DType::F32, vec![1, 90, 40]);
    let w = tensor(&mut group, &mut random, DType::F32, vec![3, 40, 40]);
    let activated = leaky(&mut group, x.clone(), 0.1);
    let op = Conv { stride: vec![1], dilation: vec![1], pad: vec![(1, 1)], groups: 1 };
    let sums = group.part(Kernel::Conv(op), vec![activated, w], x.ty.clone());
    let add = Map { steps: vec![MapStep::Binary(Binary::Add, 0, 1)] };
    let ty = x.ty.clone();
    let sum = group.part(Kernel::Map(add), vec![x, sums], ty);
    group.store(&sum);
    assert!(!Work::from(group.fused()).may_overwrite(0, 0));
    assert!(group.check());
}

/// What is activated on the way to a product is neither stored nor read by anything else, and is padded behind that.
#[test]
fn what_stands_in_front_is_for_the_product_alone() {
    let mut random = Random(16);
    let (x_ty, padded_ty) = (TensorType::f32([1, 9, 4]), TensorType::f32([1, 11, 4]));
    let pad = Pad { lo: vec![0, 1, 0], hi: vec![0, 1, 0], mode: PadMode::Edge };
    let op = Conv { stride: vec![1], dilation: vec![1], pad: vec![(0, 0)], groups: 1 };
    // Whether the activation comes first, and what else is done with it.
    let mut has_form = |is_first: bool, more: &dyn Fn(&mut Group, PartArg, PartArg)| {
        let mut group = Group::new();
        let x = group.operand(random.tensor(&x_ty, -1.0, 1.0));
        let w = tensor(&mut group, &mut random, DType::F32, vec![3, 4, 4]);
        let (activated, input) = if is_first {
            let activated = leaky(&mut group, x, 0.1);
            (activated.clone(), group.part(Kernel::Pad(pad.clone()), vec![activated], padded_ty.clone()))
        } else {
            let padded = group.part(Kernel::Pad(pad.clone()), vec![x], padded_ty.clone());
            let activated = leaky(&mut group, padded, 0.1);
            (activated.clone(), activated)
        };
        let sums = group.part(Kernel::Conv(op.clone()), vec![input, w], x_ty.clone());
        group.store(&sums);
        more(&mut group, activated, sums);
        group.fused().form().is_ok()
    };
    assert!(has_form(true, &|_, _, _| ()));
    assert!(!has_form(false, &|_, _, _| ()));
    assert!(!has_form(true, &|group, activated, _| group.store(&activated)));
    assert!(!has_form(true, &|group, activated, sums| {
        let (add, ty) = (Map { steps: vec![MapStep::Binary(Binary::Add, 0, 1)] }, sums.ty.clone());
        let sum = group.part(Kernel::Map(add), vec![sums, activated], ty);
        group.store(&sum);
    }));
}

/// More than one task in every direction.
#[test]
fn large_products_match() {
    let mut random = Random(13);
    for shape in [[800, 300, 70], [1600, 65, 200], [3, 1000, 700]] {
        let mut group = Group::new();
        let anchor = matmul(&mut group, &mut random, shape, &[]);
        let map = group.tail(&mut random, anchor, &FLOATS);
        group.store(&map);
        assert!(group.check(), "{shape:?} is refused");
    }
}

/// A copy that would read or write outside, twice, or not everything, is no store.
#[test]
fn stores_outside_are_refused() {
    let mut random = Random(15);
    let (m, n) = (4, 6);
    let fits =
        Copy { shape: vec![n, m], src_offset: 0, src_strides: vec![1, n], dst_offset: 0, dst_strides: vec![m, 1] };
    let mut group_of = |copy: Copy, elements: usize| {
        let mut group = Group::new();
        let product = matmul(&mut group, &mut random, [m, n, 5], &[]);
        let dtype = product.ty.dtype;
        let stored = group.part(Kernel::Copy(copy), vec![product], TensorType::new(dtype, vec![elements]));
        group.store(&stored);
        group.run().is_some()
    };
    assert!(group_of(fits.clone(), m * n));
    for (copy, elements) in [
        (Copy { dst_offset: 1, ..fits.clone() }, m * n),
        (Copy { src_offset: 1, ..fits.clone() }, m * n),
        (Copy { dst_strides: vec![m + 1, 1], ..fits.clone() }, m * n),
        (Copy { src_strides: vec![1, n + 1], ..fits.clone() }, m * n),
        (Copy { dst_strides: vec![m - 1, 1], ..fits.clone() }, m * n),
        (Copy { dst_strides: vec![usize::MAX / 2, 1], ..fits.clone() }, m * n),
        (fits.clone(), m * n - 1),
        (fits, m * n + 1),
    ] {
        assert!(!group_of(copy.clone(), elements), "{copy:?}");
    }
}

/// Nothing of the size of the result is kept.
#[test]
fn scratch_does_not_grow_with_the_result() {
    let mut random = Random(14);
    let mut workspace = |n: usize| {
        let (m, k) = (300, 8);
        let mut group = Group::new();
        let a = tensor(&mut group, &mut random, DType::F32, vec![m, k]);
        let b = tensor(&mut group, &mut random, DType::F32, vec![n, k]);
        let y = TensorType::f32([m, n]);
        let product = group.part(Kernel::Matmul(Matmul { transpose_rhs: true }), vec![a, b], y.clone());
        let bias = tensor(&mut group, &mut random, DType::F32, vec![n]);
        let add = Map { steps: vec![MapStep::Binary(Binary::Add, 0, 1)] };
        let sum = group.part(Kernel::Map(add), vec![product, bias], y);
        let copy =
            Copy { shape: vec![n, m], src_offset: 0, src_strides: vec![1, n], dst_offset: 0, dst_strides: vec![m, 1] };
        let turned = group.part(Kernel::Copy(copy), vec![sum], TensorType::f32([n, m]));
        group.store(&turned);
        assert!(group.check());
        group.workspace()
    };
    assert_eq!(workspace(256), workspace(2048));
}
