//! Attention with norms and rotations in front and maps behind.

use ltxc_ir::ops::{Attention, RmsNorm, Rope, RopeLayout};
use ltxc_ir::plan::{Kernel, PartArg};
use ltxc_ir::{DType, Float, TensorType};

use crate::group::{Group, infer};
use crate::harness::Random;

const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// What stands in front of queries or keys.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Front {
    Nothing,
    NormOfTokens,
    NormOfHeads,
    Rotation,
    Both,
    /// A norm behind the rotation: this has to run as a whole.
    Turned,
}

const FRONTS: [Front; 6] =
    [Front::Nothing, Front::NormOfTokens, Front::NormOfHeads, Front::Rotation, Front::Both, Front::Turned];

struct Case {
    /// Batch, queries, keys.
    b: usize,
    t: usize,
    s: usize,
    /// Heads of queries and keys.
    n: usize,
    m: usize,
    /// Head dims of queries and keys, and of values.
    d: usize,
    e: usize,
    fronts: [Front; 2],
    dtype: DType,
}

fn norm(group: &mut Group, random: &mut Random, x: PartArg, row: usize) -> PartArg {
    let rows = x.ty.elements() / row;
    // Rows of tokens keep batch and token apart.
    let shape = match x.ty.shape[2] * x.ty.shape[3] == row {
        true => vec![x.ty.shape[0], x.ty.shape[1], row],
        false => vec![x.ty.shape[0], x.ty.shape[1], rows / x.ty.shape[0] / x.ty.shape[1], row],
    };
    let ty = TensorType::new(x.ty.dtype, shape);
    let mut args = vec![PartArg { source: x.source, ty: ty.clone() }];
    if random.below(4) > 0 {
        let dtype = random.pick(&FLOATS);
        args.push(group.operand(random.tensor(&TensorType::new(dtype, vec![row]), 0.5, 1.5)));
    }
    let part = group.part(Kernel::RmsNorm(RmsNorm { eps: Float(1e-6) }), args, ty);
    PartArg { source: part.source, ty: x.ty }
}

fn rotation(group: &mut Group, random: &mut Random, x: PartArg) -> PartArg {
    let layout = random.pick(&[RopeLayout::Split, RopeLayout::Interleaved]);
    let mut tables = [0, 1].map(|_| {
        let shape = [0, 1, 2].map(|a| if random.below(2) == 0 { x.ty.shape[a] } else { 1 });
        let dtype = random.pick(&FLOATS);
        let ty = TensorType::new(dtype, vec![shape[0], shape[1], shape[2], x.ty.shape[3] / 2]);
        Some(group.operand(random.tensor(&ty, -1.0, 1.0)))
    });
    let [cos, sin] = [0, 1].map(|i| tables[i].take().expect("taken once"));
    let ty = x.ty.clone();
    group.part(Kernel::Rope(Rope { layout }), vec![x, cos, sin], ty)
}

fn prepared(group: &mut Group, random: &mut Random, dtype: DType, shape: [usize; 4], front: Front) -> PartArg {
    let x = group.operand(random.tensor(&TensorType::new(dtype, shape.to_vec()), -1.0, 1.0));
    let (head, token) = (shape[3], shape[2] * shape[3]);
    match front {
        Front::Nothing => x,
        Front::NormOfTokens => norm(group, random, x, token),
        Front::NormOfHeads => norm(group, random, x, head),
        Front::Rotation => rotation(group, random, x),
        Front::Both => {
            let row = random.pick(&[head, token]);
            let normed = norm(group, random, x, row);
            rotation(group, random, normed)
        }
        Front::Turned => {
            let turned = rotation(group, random, x);
            norm(group, random, turned, head)
        }
    }
}

impl Case {
    /// Queries and keys, attention, and a random tail if there is one.
    fn group(&self, random: &mut Random, has_tail: bool) -> Group {
        let mut group = Group::new();
        let Case { b, t, s, n, m, d, e, .. } = *self;
        let q = prepared(&mut group, random, self.dtype, [b, t, n, d], self.fronts[0]);
        let k = prepared(&mut group, random, self.dtype, [b, s, m, d], self.fronts[1]);
        let v = group.operand(random.tensor(&TensorType::new(self.dtype, vec![b, s, m, e]), -1.0, 1.0));
        let op = Attention { scale: Float(0.3), causal: t == s && random.below(3) == 0 };
        let mut args = vec![q, k, v];
        if random.below(3) == 0 {
            let bias = TensorType::f32([1, 1, t, s]);
            args.push(group.operand(random.tensor(&bias, -2.0, 0.0)));
        }
        let result = infer(&op, &args.iter().collect::<Vec<_>>()).expect("extents fit");
        let anchor = group.part(Kernel::Attention(op), args, result);
        let last = if has_tail { group.tail(random, anchor, &FLOATS) } else { anchor };
        group.store(&last);
        group
    }
}

#[test]
fn random_attention_matches() {
    let mut random = Random(21);
    let mut checked = 0;
    for _ in 0..300 {
        let m = random.pick(&[1, 1, 2, 3]);
        let t = random.pick(&[1, 2, 31, 97, 200]);
        let case = Case {
            b: random.pick(&[1, 2]),
            t,
            s: random.pick(&[t, 1, 5, 33, 200]),
            n: m * random.pick(&[1, 2, 3]),
            m,
            d: random.pick(&[2, 6, 16, 64, 194]),
            e: random.pick(&[1, 7, 32, 64]),
            fronts: [random.pick(&FRONTS), random.pick(&FRONTS)],
            dtype: random.pick(&FLOATS),
        };
        checked += usize::from(case.group(&mut random, true).check());
    }
    assert!(checked > 200, "{checked} cases are accepted");
}

/// Queries that are made on the way are so some rows at a time: with their number only the factors of the norm grow.
#[test]
fn scratch_does_not_hold_queries() {
    let mut random = Random(22);
    let mut workspace = |front, t| {
        let case = Case { b: 1, t, s: 64, n: 8, m: 8, d: 64, e: 64, fronts: [front, Front::Both], dtype: DType::F32 };
        case.group(&mut random, false).workspace()
    };
    let (plain, made, more) =
        (workspace(Front::Nothing, 4000), workspace(Front::Both, 4000), workspace(Front::Both, 8000));
    // A factor of the norm for every query and head, at most, and a row or two.
    let factors = 4000 * 8 * size_of::<f32>();
    assert!(made < plain + factors + (5 << 20), "{made} bytes of scratch, {plain} without norm and rotation");
    assert!(more <= made + factors + 64, "{more} bytes of scratch for twice the queries of {made}");
    assert!(workspace(Front::Turned, 4000) > plain + 64 * factors, "what runs as a whole is kept");
}
