//! Group norm with maps behind.

use ltxc_ir::ops::GroupNorm;
use ltxc_ir::plan::Kernel;
use ltxc_ir::{DType, Float, TensorType};

use crate::group::Group;
use crate::harness::Random;

#[test]
fn random_group_norms_match() {
    let mut random = Random(41);
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    let mut checked = 0;
    for _ in 0..200 {
        let mut group = Group::new();
        let (groups, per_group) = (random.pick(&[1, 2, 8]), random.pick(&[1, 3, 16, 70]));
        let channels = groups * per_group;
        let shape = [random.pick(&[1, 2]), random.pick(&[1, 3, 31]), random.pick(&[1, 5, 64]), channels];
        let ty = TensorType::new(random.pick(&dtypes), shape.to_vec());
        let args = [&ty.shape[..], &[channels], &[channels]]
            .map(|shape| group.operand(random.tensor(&TensorType::new(ty.dtype, shape.to_vec()), -1.0, 1.0)));
        let op = GroupNorm { groups, eps: Float(1e-6) };
        let normed = group.part(Kernel::GroupNorm(op), args.into(), ty);
        let last = group.tail(&mut random, normed, &dtypes);
        group.store(&last);
        checked += usize::from(group.check());
    }
    assert!(checked > 150, "{checked} cases are accepted");
}
