//! `attention`: softmax over blocks of keys, corrected as larger scores appear, so that scores of a whole row are never
//! kept.
//!
//! Keys and values of some heads of a batch are packed once, as panels that all threads read. Queries and keys that are
//! normed or rotated first are so token by token, some heads at a time, which reads memory in its order. Then a task owns
//! a block of queries of one head: for each block of keys it multiplies queries and keys into a block of scores, replaces these by
//! exponentials relative to the largest score so far, and adds their product with the values to its sums. What was
//! summed before is scaled down when the largest score grows. Blocks follow each other in ascending order whatever the
//! number of threads.
//!
//! # Easy to get wrong
//! - A hidden key has a score of [`HIDDEN_SCORE`], not −∞: if a bias makes all visible scores lower still, the hidden ones
//!   win. Hidden blocks are skipped only when every row has seen a score far above it.

use ltxc_ir::ops::{Attention, HIDDEN_SCORE};
use ltxc_ir::{DType, TensorType};
use std::ops::Range;

use super::element::load;
use super::gemm::{K_BLOCK, LDA};
use super::heads::{Heads, Steps, find_factors};
use super::matmul::{LANES, sum_lanes};
use super::pack::{Matrix, Panels};
use super::parallel::{Need, Scratch, Shared, for_each};
use super::simd::multiversion;
use super::sink::{Memory, Sink, Sums};
use super::tile::{Fetch, MAX_ROWS, MAX_WIDTH, Source, Store, Tile, max_rows, width};
use super::{Arg, Output, math};

/// Queries per task: with scores and sums, half of a second cache of 1 MB. A multiple of the tile heights.
const ROWS: usize = 96;

/// Keys per block: the summed elements of one tile of the second product.
const KEYS: usize = K_BLOCK;

/// Heads of a panel of keys that are prepared at a time.
const PREPARED_HEADS: usize = 8;

/// Floats of prepared queries: 4 MB.
const PREPARED_FLOATS: usize = 1 << 20;

/// Elements per task that prepares queries: few, so that threads end together where there are few tokens.
const PREPARE_TASK: usize = 1 << 13;

/// Work per element that is prepared.
const PREPARE_WEIGHT: usize = 4;

/// Floats of packed keys and values: 16 MB, what the last cache holds. One head may need more.
const PACKED_FLOATS: usize = 4 << 20;

/// Above it, [`HIDDEN_SCORE`] contributes exactly nothing.
const SEEN_SCORE: f32 = HIDDEN_SCORE as f32 / 2.0;

/// Extents of a call and how it is cut.
#[derive(Clone, Copy)]
struct Plan {
    /// Batch.
    b: usize,
    /// Queries and keys.
    t: usize,
    s: usize,
    /// Heads of queries, and of keys and values.
    n: usize,
    m: usize,
    /// Head dims of queries and keys, and of values.
    d: usize,
    e: usize,
    /// Heads of keys that are packed at a time.
    heads: usize,
}

impl Plan {
    fn new(args: &[&TensorType]) -> Plan {
        let [b, t, n, d] = [0, 1, 2, 3].map(|a| args[0].shape[a]);
        let [s, m, e] = [args[2].shape[1], args[2].shape[2], args[2].shape[3]];
        let plan = Plan { b, t, s, n, m, d, e, heads: 1 };
        let heads = PACKED_FLOATS / plan.packed_head().max(1);
        Plan { heads: heads.clamp(1, m.max(1)), ..plan }
    }

    /// Heads of queries for each of keys.
    fn queries_per_key(self) -> usize {
        self.n / self.m.max(1)
    }

    /// Floats of a prepared row of queries: those of the heads that are packed at a time.
    fn prepared_row(self) -> usize {
        self.heads * self.queries_per_key() * self.d
    }

    /// Rows of queries that are prepared at a time.
    fn prepared_rows(self) -> usize {
        let rows = PREPARED_FLOATS / self.prepared_row().max(1) / ROWS * ROWS;
        rows.clamp(ROWS, self.t.next_multiple_of(ROWS).max(ROWS))
    }

    /// Floats of the packed keys of a head.
    fn packed_keys(self) -> usize {
        self.s.next_multiple_of(MAX_WIDTH).saturating_mul(self.d)
    }

    /// Floats of packed keys and values of a head.
    fn packed_head(self) -> usize {
        self.packed_keys().saturating_add(self.e.next_multiple_of(MAX_WIDTH).saturating_mul(self.s))
    }

    /// Blocks of the head dim of queries.
    fn dim_blocks(self) -> usize {
        self.d.div_ceil(K_BLOCK).max(1)
    }
}

/// What is done to queries and to keys as they are read.
pub(crate) type Prepare<'a> = [Option<Steps<'a>>; 2];

/// Floats of the slot of a thread while it attends, without the room of the sink.
fn slot(plan: Plan) -> usize {
    let blocks = (plan.dim_blocks() + 1).saturating_mul(ROWS * LDA);
    blocks.saturating_add(ROWS.saturating_mul(plan.e))
}

/// Floats of the packed heads.
fn packed(plan: Plan) -> usize {
    plan.heads.saturating_mul(plan.packed_head()).next_multiple_of(MAX_WIDTH)
}

/// Floats of the prepared queries.
fn prepared(plan: Plan, prepare: &Prepare<'_>) -> usize {
    match prepare[0] {
        Some(_) => plan.prepared_rows().saturating_mul(plan.prepared_row()).next_multiple_of(MAX_WIDTH),
        None => 0,
    }
}

/// Scratch, besides what a sink needs for each thread.
pub(crate) fn need(args: &[&TensorType], prepare: &Prepare<'_>) -> Need {
    let plan = Plan::new(args);
    let shared = packed(plan).saturating_add(prepared(plan, prepare));
    let mut need = Need { shared, per_thread: slot(plan) };
    for (x, steps) in args.iter().zip(prepare).filter_map(|(x, p)| Some((x, p.as_ref()?))) {
        need.shared = need.shared.saturating_add(steps.shared(x));
    }
    let rooms = [
        prepare[0].as_ref().map(|steps| steps.room(plan.heads * plan.queries_per_key(), plan.d)),
        prepare[1].as_ref().map(|steps| panel_rows(plan).saturating_add(steps.room(PREPARED_HEADS, plan.d))),
    ];
    need.per_thread = rooms.into_iter().flatten().fold(need.per_thread, usize::max);
    need
}

/// Floats of the prepared rows of a panel of keys.
fn panel_rows(plan: Plan) -> usize {
    (MAX_WIDTH * PREPARED_HEADS).saturating_mul(plan.d)
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(op: &Attention, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    let types: Vec<&TensorType> = args.iter().map(|a| a.ty).collect();
    let prepare = [None, None];
    let scratch = Scratch::new(workspace, need(&types, &prepare));
    // SAFETY: passed on to the caller.
    unsafe { launch_into(op, args, &prepare, &Memory::new(out), &scratch) };
}

/// Gives the result to `sink`. Queries and keys are what `prepare` makes of the first two operands.
///
/// # Safety
/// As for [`super::launch`]; `scratch` was made for [`need`] and the sink.
pub(crate) unsafe fn launch_into(
    op: &Attention,
    args: &[Arg<'_>],
    prepare: &Prepare<'_>,
    sink: &dyn Sink,
    scratch: &Scratch<'_>,
) {
    let types: Vec<&TensorType> = args.iter().map(|a| a.ty).collect();
    let plan = Plan::new(&types);
    let prepared_queries = Shared::new(scratch.shared().get().wrapping_add(packed(plan)));
    let mut kept = prepared_queries.get().wrapping_add(prepared(plan, prepare));
    let [queries, keys] = [0, 1].map(|j| {
        let steps = prepare[j].as_ref()?;
        let at = kept;
        kept = kept.wrapping_add(steps.shared(types[j]));
        // SAFETY: `need` counted what is kept.
        Some(unsafe { Heads::new(args[j], steps, at) })
    });
    // SAFETY: `need` counted the room of the slots.
    unsafe { find_factors([queries.as_ref(), keys.as_ref()], scratch) };
    let inputs = Inputs { op, plan, args, keys, sink, slot: slot(plan) };
    let packed = scratch.shared();
    let queries_per_key = plan.queries_per_key();
    for (batch, first) in (0..plan.b).flat_map(|b| (0..plan.m).step_by(plan.heads).map(move |first| (b, first))) {
        let heads = first..plan.m.min(first + plan.heads);
        let query_heads = heads.start * queries_per_key..heads.end * queries_per_key;
        let row = query_heads.len() * plan.d;
        let packing = Packing::new(&inputs, batch, heads, packed);
        let rows_at_once = if queries.is_some() { plan.prepared_rows() } else { plan.t.max(1) };
        for start in (0..plan.t).step_by(rows_at_once) {
            let rows = start..plan.t.min(start + rows_at_once);
            // Keys and values are packed once, beside the first queries: waking threads takes as long as a few tokens.
            let (packs, packs_work) = if start == 0 { (packing.tasks(), packing.work()) } else { (0, 0) };
            let per_task = (PREPARE_TASK / row.max(1)).max(1);
            let prepares = if queries.is_some() { rows.len().div_ceil(per_task) } else { 0 };
            let prepares_work = prepares * per_task * row * PREPARE_WEIGHT;
            for_each(packs + prepares, packs_work.saturating_add(prepares_work), |task| {
                // SAFETY: called once per task.
                let room = unsafe { scratch.slot() };
                let Some(queries) = queries.as_ref().filter(|_| task >= packs) else {
                    // SAFETY: the packed heads are `packed(plan)` floats, which tasks of the last round do not read any more;
                    // the slot is what `need` says, and every task runs once.
                    return unsafe { packing.run(task, room) };
                };
                let task = task - packs;
                for r in task * per_task..rows.len().min((task + 1) * per_task) {
                    // SAFETY: the heads exist; this task owns the row, which is among the prepared ones.
                    unsafe {
                        let out = std::slice::from_raw_parts_mut(prepared_queries.get().add(r * row), row);
                        queries.token([batch, rows.start + r], query_heads.clone(), out, room);
                    }
                }
            });
            let row_blocks = rows.len().div_ceil(ROWS);
            let tasks = query_heads.len() * row_blocks;
            let work = (tasks * ROWS.min(plan.t)).saturating_mul(plan.s).saturating_mul(plan.d + plan.e);
            for_each(tasks, work, |task| {
                let (head, block) = (task / row_blocks, rows.start + task % row_blocks * ROWS);
                let block = block..rows.end.min(block + ROWS);
                let first = (block.start - rows.start) * row + head * plan.d;
                let job = Job {
                    inputs: &inputs,
                    batch,
                    head: query_heads.start + head,
                    // SAFETY: inside the prepared queries.
                    prepared: queries
                        .as_ref()
                        .map(|_| unsafe { (prepared_queries.get().add(first).cast_const(), row) }),
                    rows: block,
                    // SAFETY: inside the packed heads.
                    packed: unsafe { packed.get().add(head / queries_per_key * plan.packed_head()) },
                };
                // SAFETY: panels and queries are complete; tasks own disjoint rows of the result; called once per task.
                unsafe { job.run(scratch.slot()) };
            });
        }
    }
}

/// A call.
struct Inputs<'a> {
    op: &'a Attention,
    plan: Plan,
    args: &'a [Arg<'a>],
    /// Keys that something is done to.
    keys: Option<Heads<'a>>,
    sink: &'a dyn Sink,
    /// Floats of a slot without the room of the sink.
    slot: usize,
}

/// Packs some heads of keys and values of a batch, each into a packed head of its own: panels of keys, each `d` rows of
/// `width`, and then panels of columns of the values, each `s` rows of `width`.
struct Packing<'a> {
    inputs: &'a Inputs<'a>,
    batch: usize,
    heads: Range<usize>,
    packed: Shared<f32>,
    /// Groups of heads whose keys are prepared together, because they stand side by side in memory.
    groups: usize,
    /// Tasks that prepare a panel of keys of a group; tasks that pack what is not prepared follow.
    panels: usize,
    /// Blocks of keys.
    blocks: usize,
}

impl<'a> Packing<'a> {
    fn new(inputs: &'a Inputs<'a>, batch: usize, heads: Range<usize>, packed: Shared<f32>) -> Packing<'a> {
        let s = inputs.plan.s;
        let groups = heads.len().div_ceil(PREPARED_HEADS);
        let panels = if inputs.keys.is_some() { s.div_ceil(width()) * groups } else { 0 };
        Packing { inputs, batch, heads, packed, groups, panels, blocks: s.div_ceil(KEYS) }
    }

    fn tasks(&self) -> usize {
        self.panels + self.heads.len() * self.blocks
    }

    fn work(&self) -> usize {
        let Plan { s, d, e, .. } = self.inputs.plan;
        let weight = if self.inputs.keys.is_some() { PREPARE_WEIGHT } else { 1 };
        (self.heads.len() * s).saturating_mul(d * weight + e)
    }

    /// # Safety
    /// `packed` has room for these heads, and nothing else uses it; every task runs once, and `slot` has the size that
    /// [`need`] says.
    unsafe fn run(&self, task: usize, slot: &mut [f32]) {
        let (plan, width, heads) = (self.inputs.plan, width(), &self.heads);
        if let Some(keys) = self.inputs.keys.as_ref().filter(|_| task < self.panels) {
            let (panel, first) = (task / self.groups * width, task % self.groups * PREPARED_HEADS);
            let group = heads.start + first..heads.end.min(heads.start + first + PREPARED_HEADS);
            let panel = panel..plan.s.min(panel + width);
            // SAFETY: the panel of these heads belongs to this task.
            return unsafe {
                let to = self.packed.get().add(first * plan.packed_head());
                prepare_panel(keys, plan, self.batch, group, panel, to, slot);
            };
        }
        let (head, block) = ((task - self.panels) / self.blocks, (task - self.panels) % self.blocks);
        let keys = block * KEYS..plan.s.min((block + 1) * KEYS);
        let matrix = |arg: &Arg<'_>, dim: usize, transposed| {
            let all = Matrix { ptr: arg.ptr, dtype: arg.ty.dtype, stride: plan.m * dim, transposed };
            all.offset((self.batch * plan.s * plan.m + heads.start + head) * dim)
        };
        let k = matrix(&self.inputs.args[1], plan.d, true);
        let v = matrix(&self.inputs.args[2], plan.e, false);
        // SAFETY: every task packs its own keys of the memory of its head; panels lie one after the other; keys and
        // columns are inside the operands.
        unsafe {
            let to = self.packed.get().add(head * plan.packed_head());
            if self.inputs.keys.is_none() {
                for key in keys.clone().step_by(width) {
                    k.pack(0..plan.d, key..keys.end.min(key + width), width, to.add(key * plan.d));
                }
            }
            let values = to.add(plan.packed_keys());
            for column in (0..plan.e).step_by(width) {
                let at = values.add(column * plan.s + keys.start * width);
                v.pack(keys.clone(), column..plan.e.min(column + width), width, at);
            }
        }
    }
}

/// Prepares a panel of keys of at most [`PREPARED_HEADS`] heads, and packs it.
///
/// # Safety
/// `packed` are the packed heads from the first of these on, whose panel nothing else uses; `slot` has the size that
/// [`need`] says.
unsafe fn prepare_panel(
    keys: &Heads<'_>,
    plan: Plan,
    batch: usize,
    heads: Range<usize>,
    panel: Range<usize>,
    packed: *mut f32,
    slot: &mut [f32],
) {
    let (rows, room) = slot.split_at_mut(panel_rows(plan));
    let stride = heads.len() * plan.d;
    for (r, key) in panel.clone().enumerate() {
        // SAFETY: the heads exist.
        unsafe { keys.token([batch, key], heads.clone(), &mut rows[r * stride..][..stride], room) };
    }
    for head in 0..heads.len() {
        let ptr = rows[head * plan.d..].as_ptr().cast();
        let matrix = Matrix { ptr, dtype: DType::F32, stride, transposed: true };
        // SAFETY: the panel is inside the packed head, its rows were prepared.
        unsafe {
            let to = packed.add(head * plan.packed_head() + panel.start * plan.d);
            matrix.pack(0..plan.d, 0..panel.len(), width(), to);
        }
    }
}

/// A block of queries of one head.
struct Job<'a> {
    inputs: &'a Inputs<'a>,
    batch: usize,
    /// Of the queries.
    head: usize,
    rows: Range<usize>,
    /// The first of them, if they were prepared, and floats from one to the next.
    prepared: Option<(*const f32, usize)>,
    /// Keys and values of the head.
    packed: *const f32,
}

/// What is known of a row after some blocks of keys.
#[derive(Clone, Copy)]
struct Seen {
    /// Largest score.
    max: f32,
    /// Sum of exponentials relative to it.
    sum: f32,
}

impl Job<'_> {
    /// # Safety
    /// As for [`launch`]; nothing else writes these rows of the result. `slot` has the size that [`need`] says.
    unsafe fn run(&self, slot: &mut [f32]) {
        let plan = self.inputs.plan;
        let Plan { s, d, e, .. } = plan;
        let (slot, sink_room) = slot.split_at_mut(self.inputs.slot);
        let (queries, rest) = slot.split_at_mut(plan.dim_blocks() * ROWS * LDA);
        let (scores, rest) = rest.split_at_mut(ROWS * LDA);
        let sums = &mut rest[..self.rows.len() * e];
        // SAFETY: the rows are inside the queries.
        unsafe { self.load_queries(queries) };
        let mut seen = [Seen { max: f32::NEG_INFINITY, sum: 0.0 }; ROWS];
        let seen = &mut seen[..self.rows.len()];
        // SAFETY: values follow the keys.
        let values = unsafe { self.packed.add(plan.packed_keys()) };
        let width = width();
        for first in (0..s).step_by(KEYS) {
            let keys = first..s.min(first + KEYS);
            let is_hidden = self.inputs.op.causal && self.visible(self.rows.end - 1) <= first;
            if is_hidden && seen.iter().all(|row| row.max > SEEN_SCORE) {
                break;
            }
            for (block, dims) in (0..d.max(1)).step_by(K_BLOCK).enumerate() {
                let k = K_BLOCK.min(d - dims);
                let panel = |p: usize| self.packed.wrapping_add((first + p * width) * d + dims * width);
                let target =
                    Block { ptr: scores.as_mut_ptr(), stride: LDA, rows: self.rows.len(), columns: keys.len() };
                // SAFETY: queries, panels and scores have these extents.
                unsafe { product(&queries[block * ROWS * LDA..], k, &panel, target, dims > 0) };
            }
            for (r, seen) in seen.iter_mut().enumerate() {
                let row = &mut scores[r * LDA..][..keys.len()];
                // SAFETY: row and keys are inside the bias.
                let max = unsafe { self.adjust(self.rows.start + r, &keys, row) };
                let sum = &mut sums[r * e..][..e];
                if max > seen.max {
                    if first > 0 {
                        let factor = math::exp(seen.max - max);
                        seen.sum *= factor;
                        multiply(factor, sum);
                    }
                    seen.max = max;
                }
                seen.sum += exponentials(seen.max, row);
            }
            let panel = |p: usize| values.wrapping_add((p * s + first) * width);
            let target = Block { ptr: sums.as_mut_ptr(), stride: e, rows: self.rows.len(), columns: e };
            // SAFETY: scores, panels and sums have these extents.
            unsafe { product(scores, keys.len(), &panel, target, first > 0) };
        }
        for (r, seen) in seen.iter().enumerate() {
            multiply(1.0 / seen.sum, &mut sums[r * e..][..e]);
        }
        let at = |r: usize| self.query(self.rows.start + r) * e;
        // SAFETY: this task owns these rows of the result.
        unsafe { self.inputs.sink.take(Sums::dense(sums, e), &at, sink_room) };
    }

    /// Number of row `t` of this head among all rows of all heads.
    fn query(&self, t: usize) -> usize {
        let plan = self.inputs.plan;
        (self.batch * plan.t + t) * plan.n + self.head
    }

    /// Keys that query `t` sees.
    fn visible(&self, t: usize) -> usize {
        let plan = self.inputs.plan;
        if self.inputs.op.causal { t + plan.s - plan.t + 1 } else { plan.s }
    }

    /// Widens the queries to blocks of dims, each [`ROWS`] rows at distance [`LDA`].
    ///
    /// # Safety
    /// The rows are inside the operand.
    unsafe fn load_queries(&self, queries: &mut [f32]) {
        let (q, d) = (&self.inputs.args[0], self.inputs.plan.d);
        for (r, t) in self.rows.clone().enumerate() {
            let (dtype, row) = match self.prepared {
                Some((first, stride)) => (DType::F32, first.wrapping_add(r * stride).cast()),
                None => (q.ty.dtype, q.ptr.wrapping_add(self.query(t) * d * q.ty.dtype.bytes())),
            };
            for (block, dims) in (0..d).step_by(K_BLOCK).enumerate() {
                let k = K_BLOCK.min(d - dims);
                let dst = &mut queries[(block * ROWS + r) * LDA..][..k];
                // SAFETY: the elements are inside the row.
                unsafe { load(dtype, row.add(dims * dtype.bytes()), dst) };
            }
        }
    }

    /// Makes scores of the products of query `t` and `keys`: scales, adds the bias and hides later keys. Returns the
    /// largest.
    ///
    /// # Safety
    /// The bias has this query and these keys.
    unsafe fn adjust(&self, t: usize, keys: &Range<usize>, row: &mut [f32]) -> f32 {
        let scale = self.inputs.op.scale.0 as f32;
        let visible = self.visible(t).saturating_sub(keys.start).min(row.len());
        let (seen, hidden) = row.split_at_mut(visible);
        hidden.fill(HIDDEN_SCORE as f32);
        let max = match self.inputs.args.get(3) {
            None => scale_row(scale, seen),
            Some(bias) => {
                debug_assert_eq!(bias.ty.dtype, DType::F32);
                let index = [self.batch, self.head, t, keys.start];
                let element = index.iter().zip(&bias.ty.shape).fold(0, |at, (&i, &extent)| {
                    // An axis of extent 1 repeats.
                    at * extent + if extent == 1 { 0 } else { i }
                });
                // SAFETY: the element is inside the bias, with the keys behind it unless these repeat.
                unsafe {
                    let first = bias.ptr.cast::<f32>().add(element);
                    if bias.ty.shape[3] == 1 {
                        add_constant(scale, *first, seen)
                    } else {
                        add_row(scale, std::slice::from_raw_parts(first, visible), seen)
                    }
                }
            }
        };
        if hidden.is_empty() { max } else { larger(HIDDEN_SCORE as f32, max) }
    }
}

/// A block of rows that is written.
#[derive(Clone, Copy)]
struct Block {
    ptr: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
}

/// Sets `c` to the product of `c.rows` rows of `a`, [`LDA`] apart, and panels of `k` rows, or adds it.
///
/// # Safety
/// `a` and the panels have these extents; nothing else uses `c`.
unsafe fn product(a: &[f32], k: usize, panel: &dyn Fn(usize) -> *const f32, c: Block, adds: bool) {
    let width = width();
    let tiles = c.rows.div_ceil(max_rows());
    let height = c.rows.div_ceil(tiles);
    for column in (0..c.columns).step_by(width) {
        let at = column / width;
        let source = Source { at: panel(at + 1).cast(), along: width * size_of::<f32>(), across: size_of::<f32>() };
        for (part, first) in (0..c.rows).step_by(height).enumerate() {
            let rows: [*mut f32; MAX_ROWS] =
                std::array::from_fn(|r| c.ptr.wrapping_add((first + r) * c.stride + column));
            let tile = Tile {
                k,
                a: a[first * LDA..].as_ptr(),
                b: panel(at),
                columns: width.min(c.columns - column),
                store: if adds { Store::Add } else { Store::Set },
                fetch: Fetch::part(source, part, tiles),
            };
            // SAFETY: the rows are inside `c`, the rest is what the caller promises.
            unsafe { tile.run::<LDA>(&rows[..height.min(c.rows - first)]) };
        }
    }
}

/// NaN in `b` loses; the exponentials find it.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Replaces each element and returns the largest.
#[inline(always)]
fn replace(row: &mut [f32], f: impl Fn(usize, f32) -> f32) -> f32 {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    let mut at = 0;
    for chunk in &mut chunks {
        for i in 0..LANES {
            chunk[i] = f(at + i, chunk[i]);
            max[i] = larger(max[i], chunk[i]);
        }
        at += LANES;
    }
    for (i, x) in chunks.into_remainder().iter_mut().enumerate() {
        *x = f(at + i, *x);
        max[i] = larger(max[i], *x);
    }
    max.iter().fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}

multiversion! {
    fn scale_row(scale: f32, row: &mut [f32]) -> f32 {
        replace(row, |_, x| x * scale)
    }
}

multiversion! {
    fn add_constant(scale: f32, bias: f32, row: &mut [f32]) -> f32 {
        replace(row, |_, x| x.mul_add(scale, bias))
    }
}

multiversion! {
    fn add_row(scale: f32, bias: &[f32], row: &mut [f32]) -> f32 {
        let bias = &bias[..row.len()];
        replace(row, |i, x| x.mul_add(scale, bias[i]))
    }
}

multiversion! {
    fn multiply(factor: f32, row: &mut [f32]) {
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

multiversion! {
    /// Replaces scores by their exponentials relative to `max` and returns the sum.
    fn exponentials(max: f32, row: &mut [f32]) -> f32 {
        let mut sums = [0f32; LANES];
        let mut chunks = row.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for i in 0..LANES {
                chunk[i] = math::exp(chunk[i] - max);
                sums[i] += chunk[i];
            }
        }
        for (x, sum) in chunks.into_remainder().iter_mut().zip(&mut sums) {
            *x = math::exp(*x - max);
            *sum += *x;
        }
        sum_lanes(&mut sums)
    }
}
