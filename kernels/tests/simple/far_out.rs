//! What only the CPU promises.

use ltxc_ir::ops::Unary;
use ltxc_ir::plan::MapStep;

use super::cases::Convolution;
use super::conv;
use super::map::check;

#[test]
fn trigonometry_holds_beyond_the_vectorised_range() {
    check(MapStep::Unary(Unary::Sin, 0), 1e6, 1e9, 2.0, 0.0, |b, x| b.unary(Unary::Sin, x));
    check(MapStep::Unary(Unary::Cos, 0), -1e9, 2e6, 2.0, 0.0, |b, x| b.unary(Unary::Cos, x));
}

#[test]
fn everything_is_far_padding() {
    // More padding than positions can count: the row in front of the input is all zeros.
    let far = usize::MAX / 2;
    conv::check(Convolution { pad: vec![(far, 0)], stride: vec![far], ..Convolution::line(5, 2, 3, 3) });
    conv::check(Convolution { pad: vec![(far, 0)], stride: vec![far], groups: 3, ..Convolution::line(5, 2, 1, 1) });
}
