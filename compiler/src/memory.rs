//! Where buffers lie: offsets in arenas such that no two buffers that are alive together overlap.
//!
//! What is alive when is known exactly, because a plan is a list of steps. Blocks are placed one after the other, each
//! into the smallest gap that the blocks alive with it leave. Two orders are tried, large blocks first and early blocks
//! first, and the one with the smaller peak is taken: neither wins always, and both are cheap.

use std::cmp::Reverse;

/// Something that needs memory from step `first` to step `last`, both included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Size.
    pub bytes: u64,
    /// First step that touches it.
    pub first: usize,
    /// Last step that touches it.
    pub last: usize,
    /// The arena it must lie in; `None` if any will do.
    pub arena: Option<u32>,
}

impl Block {
    fn is_alive_with(&self, other: &Block) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// Arena and offset of every block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Arena and byte offset, in the order of the blocks. Empty blocks lie at offset 0 of arena 0.
    pub places: Vec<(u32, u64)>,
    /// Bytes used of each arena.
    pub arena_bytes: Vec<u64>,
}

/// Why blocks could not be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryError {
    /// The block with this number does not fit into an arena.
    TooLarge(usize),
    /// An offset does not fit a number.
    Overflow,
}

/// Places blocks at multiples of `alignment` in arenas of at most `max_arena_bytes`.
///
/// # Errors
/// A block that is larger than an arena, or that finds no room in the arena it must lie in.
pub fn place(blocks: &[Block], alignment: u64, max_arena_bytes: u64) -> Result<Layout, MemoryError> {
    let mut by_size: Vec<usize> = (0..blocks.len()).collect();
    // Blocks that are bound to an arena have the least choice.
    by_size.sort_by_key(|&i| (blocks[i].arena.is_none(), Reverse(blocks[i].bytes), blocks[i].first, i));
    let mut by_time: Vec<usize> = (0..blocks.len()).collect();
    by_time.sort_by_key(|&i| (blocks[i].first, Reverse(blocks[i].bytes), i));
    let total = |layout: &Layout| layout.arena_bytes.iter().fold(0u64, |n, &b| n.saturating_add(b));
    let large_first = place_in_order(blocks, &by_size, alignment, max_arena_bytes);
    let early_first = place_in_order(blocks, &by_time, alignment, max_arena_bytes);
    match (large_first, early_first) {
        (Ok(a), Ok(b)) => Ok(if total(&b) < total(&a) { b } else { a }),
        (Ok(layout), Err(_)) | (Err(_), Ok(layout)) => Ok(layout),
        (Err(error), Err(_)) => Err(error),
    }
}

fn place_in_order(blocks: &[Block], order: &[usize], alignment: u64, limit: u64) -> Result<Layout, MemoryError> {
    let mut places = vec![(0, 0); blocks.len()];
    // Per arena the blocks placed so far, by offset.
    let mut arenas: Vec<Vec<(u64, usize)>> = Vec::new();
    for &i in order.iter().filter(|&&i| blocks[i].bytes > 0) {
        let bytes = blocks[i].bytes.checked_next_multiple_of(alignment).ok_or(MemoryError::Overflow)?;
        let (first, end) = match blocks[i].arena {
            Some(a) => (a as usize, a as usize + 1),
            None => (0, usize::MAX),
        };
        let mut arena = first;
        let offset = loop {
            if arenas.len() <= arena {
                arenas.resize(arena + 1, Vec::new());
            }
            let offset = best_gap(blocks, &arenas[arena], i, bytes, alignment)?;
            if offset.checked_add(blocks[i].bytes).ok_or(MemoryError::Overflow)? <= limit {
                break offset;
            }
            arena += 1;
            // An arena without blocks has room for everything that fits at all.
            if arena == end || arenas[arena - 1].is_empty() {
                return Err(MemoryError::TooLarge(i));
            }
        };
        let taken = &mut arenas[arena];
        let at = taken.partition_point(|&(o, _)| o <= offset);
        taken.insert(at, (offset, i));
        places[i] = (arena as u32, offset);
    }
    let arena_bytes = arenas.iter().map(|taken| {
        let ends = taken.iter().map(|&(offset, i)| offset + blocks[i].bytes);
        ends.max().unwrap_or(0).checked_next_multiple_of(alignment).ok_or(MemoryError::Overflow)
    });
    Ok(Layout { places, arena_bytes: arena_bytes.collect::<Result<_, _>>()? })
}

/// Offset of the smallest gap of at least `bytes` between the blocks alive with block `i`; behind all if there is none.
fn best_gap(
    blocks: &[Block],
    taken: &[(u64, usize)],
    i: usize,
    bytes: u64,
    alignment: u64,
) -> Result<u64, MemoryError> {
    let mut best: Option<(u64, u64)> = None;
    let mut free_from = 0u64;
    for &(offset, other) in taken.iter().filter(|&&(_, other)| blocks[i].is_alive_with(&blocks[other])) {
        if let Some(gap) = offset.checked_sub(free_from)
            && gap >= bytes
            && best.is_none_or(|(smallest, _)| gap < smallest)
        {
            best = Some((gap, free_from));
        }
        let end = offset.checked_add(blocks[other].bytes).and_then(|e| e.checked_next_multiple_of(alignment));
        free_from = free_from.max(end.ok_or(MemoryError::Overflow)?);
    }
    Ok(best.map_or(free_from, |(_, offset)| offset))
}
