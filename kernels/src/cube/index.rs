//! From positions of a result to elements of operands: extents and strides that are merged here as far as they go, and
//! divided through in kernels. Kernels know how many axes there are; extents and strides are arguments of a launch.

use cubecl::prelude::*;

use super::call::to_u32;

/// Axes that several operands are walked along, outermost first, without extents of 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Walk {
    /// Extents.
    pub(crate) extents: Vec<usize>,
    /// For each operand, a stride per axis, in elements.
    pub(crate) strides: Vec<Vec<usize>>,
}

impl Walk {
    /// Merges axes that are one to every operand: a step on the outer one is as long as the inner one.
    pub(crate) fn new(shape: &[usize], strides: &[Vec<usize>]) -> Walk {
        let mut walk = Walk { extents: Vec::new(), strides: vec![Vec::new(); strides.len()] };
        for (a, &extent) in shape.iter().enumerate().filter(|&(_, &extent)| extent != 1) {
            let is_merged = !walk.extents.is_empty()
                && walk.strides.iter().zip(strides).all(|(own, s)| own.last() == s[a].checked_mul(extent).as_ref());
            if is_merged {
                let last = walk.extents.len() - 1;
                walk.extents[last] *= extent;
                walk.strides.iter_mut().zip(strides).for_each(|(own, s)| own[last] = s[a]);
            } else {
                walk.extents.push(extent);
                walk.strides.iter_mut().zip(strides).for_each(|(own, s)| own.push(s[a]));
            }
        }
        walk
    }

    /// The same box with the largest stride of an operand first. Where each axis steps over all that those with smaller
    /// strides reach, an element of that operand has at most one index, found by dividing.
    pub(crate) fn by_stride(&self, operand: usize) -> Walk {
        let mut order: Vec<usize> = (0..self.rank()).collect();
        order.sort_by_key(|&a| std::cmp::Reverse(self.strides[operand][a]));
        let pick = |values: &[usize]| order.iter().map(|&a| values[a]).collect::<Vec<_>>();
        Walk { extents: pick(&self.extents), strides: self.strides.iter().map(|s| pick(s)).collect() }
    }

    /// Number of axes.
    pub(crate) fn rank(&self) -> usize {
        self.extents.len()
    }

    /// Whether the elements of an operand follow each other.
    pub(crate) fn is_flat(&self, operand: usize) -> bool {
        self.strides[operand] == ltxc_ir::types::strides_of(&self.extents)
    }

    /// Whether an operand is one element.
    pub(crate) fn is_constant(&self, operand: usize) -> bool {
        self.strides[operand].iter().all(|&stride| stride == 0)
    }
}

/// Strides of an operand that broadcasts to `shape`.
pub(crate) fn broadcast_strides(own: &[usize], shape: &[usize]) -> Vec<usize> {
    let strides = ltxc_ir::types::strides_of(own);
    let lead = shape.len() - own.len();
    (0..shape.len()).map(|a| if a < lead || own[a - lead] == 1 { 0 } else { strides[a - lead] }).collect()
}

/// Numbers as an argument of a launch.
///
/// # Errors
/// A number beyond u32.
pub(crate) fn numbers<R: Runtime>(values: impl IntoIterator<Item = usize>) -> Result<SequenceArg<R, u32>, String> {
    let mut arg = SequenceArg::new();
    values.into_iter().try_for_each(|value| to_u32(value).map(|value| arg.push(value)))?;
    Ok(arg)
}

/// The index along each axis of a position, outermost first.
#[cube]
pub(crate) fn coordinates(position: u32, extents: &Sequence<u32>) -> Sequence<u32> {
    let rank = extents.len();
    let mut reversed = Sequence::<u32>::new();
    let mut rest = position;
    #[unroll]
    for i in 0..rank {
        let a = comptime!(rank - 1 - i);
        if comptime!(a == 0) {
            reversed.push(rest);
        } else {
            let extent = *extents.index(a);
            let quotient = rest / extent;
            reversed.push(rest - quotient * extent);
            rest = quotient;
        }
    }
    let mut ordered = Sequence::<u32>::new();
    #[unroll]
    for i in 0..rank {
        ordered.push(*reversed.index(comptime!(rank - 1 - i)));
    }
    ordered
}

/// The element at some coordinates; `strides` holds those of this operand from `first` on.
#[cube]
pub(crate) fn offset(coordinates: &Sequence<u32>, strides: &Sequence<u32>, #[comptime] first: usize) -> u32 {
    let mut sum = 0u32;
    #[unroll]
    for a in 0..coordinates.len() {
        sum += *coordinates.index(a) * *strides.index(comptime!(first + a));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_merge_where_all_operands_agree() {
        let walk = Walk::new(&[2, 3, 1, 5], &[vec![15, 5, 5, 1], vec![0, 0, 0, 1]]);
        assert_eq!(walk, Walk { extents: vec![6, 5], strides: vec![vec![5, 1], vec![0, 1]] });
        assert!(walk.is_flat(0) && !walk.is_flat(1));
        let one = Walk::new(&[1, 1], &[vec![1, 1], vec![0, 0]]);
        assert!(one.rank() == 0 && one.is_flat(0) && one.is_constant(1));
    }
}
