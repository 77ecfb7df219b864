//! Work along rows.

use ltxc_ir::ops::{LayerNorm, RmsNorm};
use ltxc_ir::plan::Kernel;
use ltxc_ir::{DType, Float, TensorType};

use crate::group::Group;
use crate::harness::Random;

#[test]
fn random_rows_match() {
    let mut random = Random(31);
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    let mut checked = 0;
    for _ in 0..300 {
        let mut group = Group::new();
        let shape = [random.pick(&[1, 2, 3]), random.pick(&[1, 7, 64, 300]), random.pick(&[1, 2, 33, 130, 1000])];
        let ty = TensorType::new(random.pick(&dtypes), shape.to_vec());
        let x = group.operand(random.tensor(&ty, -1.0, 1.0));
        let norm = match random.below(2) {
            0 => Kernel::RmsNorm(RmsNorm { eps: Float(1e-6) }),
            _ => Kernel::LayerNorm(LayerNorm { eps: Float(1e-6) }),
        };
        let normed = group.part(norm, vec![x], ty);
        let last = group.tail(&mut random, normed, &dtypes);
        group.store(&last);
        checked += usize::from(group.check());
    }
    assert!(checked > 200, "{checked} cases are accepted");
}
