//! What only the CPU promises.

use ltxc_ir::ops::Unary;
use ltxc_ir::plan::MapStep;

use super::map::check;

#[test]
fn trigonometry_holds_beyond_the_vectorised_range() {
    check(MapStep::Unary(Unary::Sin, 0), 1e6, 1e9, 2.0, 0.0, |b, x| b.unary(Unary::Sin, x));
    check(MapStep::Unary(Unary::Cos, 0), -1e9, 2e6, 2.0, 0.0, |b, x| b.unary(Unary::Cos, x));
}
