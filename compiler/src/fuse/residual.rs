//! Residual paths around depth-to-space.
//!
//! ```text
//! d2s(y) + tile(d2s(x)) = d2s(y + tile(x))
//! ```
//!
//! and the same with frames dropped on both sides. Depth-to-space only moves elements, so what is added behind it can be
//! added in front of it, where the convolution that makes `y` adds it as it stores.
//!
//! Channel `c · p + f` of `y` goes to channel `c`, position `f`. Tiling repeats whole groups of channels behind
//! depth-to-space, and therefore in front of it too.

use ltxc_ir::ops::{Binary, Concat, DepthToSpace, Slice};
use ltxc_ir::{Builder, Function, Module, Op, ValueId};

use super::graph::Graph;
use crate::options::{Fuse, Options};
use crate::rebuild::Rebuild;

/// Pass `fuse-residual`. See the module documentation.
pub fn fuse_residual(module: &Module, options: &Options) -> Module {
    if options.fuse != Fuse::Full {
        return module.clone();
    }
    Module { functions: module.functions.iter().map(rewrite).collect(), entries: module.entries.clone() }
}

/// A sum that can be moved.
struct Residual<'a> {
    /// Operand of the depth-to-space on the main path, and of the one that is tiled.
    y: ValueId,
    x: ValueId,
    store: &'a DepthToSpace,
    cut: Option<&'a Slice>,
}

fn rewrite(function: &Function) -> Function {
    // Nothing is grouped here.
    let graph = Graph::new(function, u32::MAX);
    let mut rebuild = Rebuild::new(function, &function.name);
    rebuild.params();
    for (i, node) in function.nodes.iter().enumerate() {
        let Some(found) = find(&graph, i) else {
            rebuild.node(node);
            continue;
        };
        let (y, x) = (rebuild.get(found.y), rebuild.get(found.x));
        let b = Builder::from_function(std::mem::take(&mut rebuild.out));
        let value = emit(&b, &found, y, x);
        // Types follow from those of verified nodes.
        rebuild.out = b.finish().expect("a sum of verified operands is well typed");
        rebuild.out.values[value.index()].name = function.name_of(node.results[0]).into();
        rebuild.set(node.results[0], value);
    }
    rebuild.results();
    rebuild.out
}

fn emit(b: &Builder, found: &Residual<'_>, y: ValueId, x: ValueId) -> ValueId {
    let (wide, narrow) = (b.shape(y), b.shape(x));
    let last = wide.len() - 1;
    let channels = narrow[last];
    // [.., groups, channels] and [.., 1, channels]
    let split = |shape: &[usize], groups: usize| [&shape[..last], &[groups, channels]].concat();
    let main = b.reshape(y, &split(&wide, wide[last] / channels));
    let sum = b.reshape(b.add(main, b.reshape(x, &split(&narrow, 1))), &wide);
    let stored = b.push(found.store.clone(), &[sum]);
    match found.cut {
        Some(cut) => b.push(cut.clone(), &[stored]),
        None => stored,
    }
}

/// The sum at node `i`, if it is one around depth-to-space.
fn find<'a>(graph: &Graph<'a>, i: usize) -> Option<Residual<'a>> {
    let node = graph.node(i);
    let Op::Binary(Binary::Add) = node.op else { return None };
    let [a, b] = node.args[..] else { return None };
    // The main path is named first; sums commute.
    [(a, b), (b, a)].into_iter().find_map(|(main, skip)| {
        let (y, store, cut) = stored(graph, main)?;
        graph.only_user(graph.definition(main)?)?;
        let (x, other_store, other_cut) = stored(graph, tiled(graph, skip)?)?;
        let (wide, narrow) = (graph.function.ty(y), graph.function.ty(x));
        let last = wide.rank() - 1;
        let fits = wide.shape[..last] == narrow.shape[..last]
            && narrow.shape[last] > 0
            && wide.shape[last].is_multiple_of(narrow.shape[last])
            && wide.dtype == narrow.dtype
            && graph.function.ty(main) == graph.function.ty(skip);
        let is_same = store == other_store && cut_outside_channels(cut, last) == cut_outside_channels(other_cut, last);
        (fits && is_same).then_some(Residual { y, x, store, cut })
    })
}

/// What a slice does to all axes but the last, which it must leave alone.
fn cut_outside_channels(cut: Option<&Slice>, last: usize) -> Option<(&[usize], &[usize], &[usize])> {
    cut.map(|s| (&s.start[..last], &s.end[..last], &s.step[..last]))
}

/// The operand of `slice(depth_to_space(..))` or `depth_to_space(..)`, with both ops; the slice keeps all channels.
fn stored<'a>(graph: &Graph<'a>, value: ValueId) -> Option<(ValueId, &'a DepthToSpace, Option<&'a Slice>)> {
    let node = graph.node(graph.definition(value)?);
    match &node.op {
        Op::DepthToSpace(op) => Some((node.args[0], op, None)),
        Op::Slice(cut) => {
            let whole = graph.function.ty(node.args[0]);
            let last = whole.rank().checked_sub(1)?;
            let keeps_channels = cut.start[last] == 0 && cut.end[last] == whole.shape[last] && cut.step[last] == 1;
            let inner = graph.node(graph.definition(node.args[0])?);
            match &inner.op {
                Op::DepthToSpace(op) if keeps_channels => Some((inner.args[0], op, Some(cut))),
                _ => None,
            }
        }
        _ => None,
    }
}

/// The value that is repeated along the channels to make `value`; itself if it is made otherwise.
fn tiled(graph: &Graph<'_>, value: ValueId) -> Option<ValueId> {
    let node = graph.node(graph.definition(value)?);
    match &node.op {
        Op::Concat(Concat { axis }) if axis + 1 == graph.function.ty(value).rank() => {
            let first = node.args[0];
            node.args.iter().all(|&a| a == first).then_some(first)
        }
        _ => Some(value),
    }
}
