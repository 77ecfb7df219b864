//! Memory planning: blocks that are alive together never overlap, and the peak is what must be.

use ltxc_compiler::memory::{Block, MemoryError, place};
use proptest::prelude::*;

fn block() -> impl Strategy<Value = Block> {
    (0u64..5000, 0usize..40, 0usize..10, 0u32..6).prop_map(|(bytes, first, length, arena)| Block {
        bytes,
        first,
        last: first + length,
        // Most blocks may lie anywhere, as in plans.
        arena: (arena < 2).then_some(arena),
    })
}

proptest! {
    #[test]
    fn blocks_alive_together_do_not_overlap(blocks in prop::collection::vec(block(), 0..60), shift in 0u32..9) {
        let alignment = 1u64 << shift;
        let layout = place(&blocks, alignment, 1 << 40).unwrap();
        for (i, a) in blocks.iter().enumerate() {
            let (arena, offset) = layout.places[i];
            if a.bytes == 0 {
                continue;
            }
            prop_assert_eq!(offset % alignment, 0);
            prop_assert!(offset + a.bytes <= layout.arena_bytes[arena as usize]);
            prop_assert!(a.arena.is_none_or(|wanted| wanted == arena));
            for (j, b) in blocks.iter().enumerate().skip(i + 1) {
                let (other_arena, other) = layout.places[j];
                let together = a.first <= b.last && b.first <= a.last;
                let meet = arena == other_arena && offset < other + b.bytes && other < offset + a.bytes;
                prop_assert!(!(together && meet && b.bytes > 0), "{i} and {j}");
            }
        }
        prop_assert_eq!(&layout, &place(&blocks, alignment, 1 << 40).unwrap());
    }

    #[test]
    fn the_peak_is_at_least_what_is_alive_at_any_step(blocks in prop::collection::vec(block(), 0..60)) {
        let layout = place(&blocks, 64, 1 << 40).unwrap();
        let total: u64 = layout.arena_bytes.iter().sum();
        for step in 0..50 {
            let alive: u64 = blocks.iter().filter(|b| b.first <= step && step <= b.last).map(|b| b.bytes).sum();
            prop_assert!(alive <= total, "step {step}: {alive} of {total}");
        }
    }

    #[test]
    fn arenas_stay_within_their_limit(blocks in prop::collection::vec(block(), 0..60)) {
        let free: Vec<Block> = blocks.into_iter().map(|b| Block { arena: None, ..b }).collect();
        let layout = place(&free, 64, 8192).unwrap();
        prop_assert!(layout.arena_bytes.iter().all(|&bytes| bytes <= 8192));
    }
}

fn at(bytes: u64, first: usize, last: usize) -> Block {
    Block { bytes, first, last, arena: None }
}

#[test]
fn a_block_larger_than_an_arena_is_refused() {
    assert_eq!(place(&[at(10, 0, 0), at(100, 0, 0)], 1, 64), Err(MemoryError::TooLarge(1)));
}

#[test]
fn sizes_that_overflow_are_refused() {
    assert_eq!(place(&[at(u64::MAX, 0, 0)], 64, u64::MAX), Err(MemoryError::Overflow));
}

#[test]
fn memory_is_used_again() {
    let layout = place(&[at(100, 0, 1), at(100, 2, 3), at(50, 1, 2)], 1, 1 << 20).unwrap();
    assert_eq!(layout.arena_bytes, [150]);
}

#[test]
fn the_smallest_gap_is_taken() {
    // Alive together: 0..100, 140..240 and 270..370, then a block of 30 that fits both gaps.
    let blocks = [at(370, 0, 0), at(100, 1, 9), at(40, 1, 1), at(100, 1, 9), at(30, 1, 1), at(100, 1, 9), at(30, 2, 9)];
    let layout = place(&blocks, 1, 1 << 20).unwrap();
    assert!(layout.arena_bytes.iter().sum::<u64>() <= 400);
}
