//! Steps, run by the CPU as a strict device would, against the calls they stand for.

use ltxc_ir::TensorType;
use ltxc_ir::ops::{Binary, RmsNorm, Unary};
use ltxc_ir::plan::{Copy, Fused, Kernel, Map, MapStep, Part, PartArg, Source, Work};
use ltxc_ir::{DType, Float};

use super::*;
use crate::backend::{Backend, BufferId, Cpu};

const SIZE: u64 = 4096;

/// A call on one buffer.
struct Case {
    work: Work,
    /// Type and offset.
    args: Vec<(TensorType, u64)>,
    results: Vec<(TensorType, u64)>,
}

impl Case {
    fn new(work: impl Into<Work>, args: &[(TensorType, u64)], results: &[(TensorType, u64)]) -> Case {
        Case { work: work.into(), args: args.to_vec(), results: results.to_vec() }
    }

    fn call(&self, buffer: BufferId) -> Call<'_> {
        let place = |operand: &(TensorType, u64)| Region { buffer, offset: operand.1 };
        let args = self.args.iter().map(|a| (&a.0, place(a))).collect();
        let results = self.results.iter().map(|r| (&r.0, place(r))).collect();
        Call { work: &self.work, args, results, flops: 0, bytes: 0 }
    }

    /// Runs it whole and in steps on a device with this alignment, and compares all memory. Returns steps and scratch.
    #[track_caller]
    fn check(&self, alignment: u64) -> (usize, u64) {
        let types = |operands: &[(TensorType, u64)]| operands.iter().map(|o| o.0.clone()).collect::<Vec<_>>();
        let (args, results) = (types(&self.args), types(&self.results));
        self.work.check(&args.iter().collect::<Vec<_>>(), &results.iter().collect::<Vec<_>>()).unwrap();

        // Small numbers in f32 and in bf16, all different.
        let before: Vec<u8> = (0..SIZE / 4).flat_map(|i| (1.0f32 + i as f32 / 512.0).to_ne_bytes()).collect();
        let mut whole = Cpu::default();
        let buffer = whole.allocate(SIZE).unwrap();
        let all = Region { buffer, offset: 0 };
        whole.write(all, &before).unwrap();
        let call = whole.bind(self.call(buffer)).unwrap();
        whole.launch(call).unwrap();
        let expected = whole.read(all, SIZE).unwrap().into_owned();

        let rules = Rules { alignment, scratch_bytes: &|_, _, _| 12 };
        let mut device = Cpu::default();
        let buffer = device.allocate(SIZE).unwrap();
        device.write(all, &before).unwrap();
        let (steps, scratch_bytes) = steps_of(&self.call(buffer), &rules);
        let scratch = device.allocate(scratch_bytes).unwrap();
        for step in &steps {
            let place = |tensor: &Tensor<'_>| match tensor.at {
                At::Region(region) => region,
                At::Scratch(offset) => Region { buffer: scratch, offset },
            };
            let is_copy = matches!(&*step.work, Work::Kernel(Kernel::Copy(_)));
            for tensor in step.args.iter().chain(&step.results) {
                assert!(place(tensor).offset.is_multiple_of(alignment), "{tensor:?} is not aligned");
                let end = place(tensor).offset + tensor.ty.bytes() as u64;
                let held = if place(tensor).buffer == scratch { scratch_bytes } else { SIZE };
                assert!(end <= held, "{tensor:?} leaves {held} bytes");
            }
            assert!(step.scratch.0 + step.scratch.1 <= scratch_bytes);
            let placed = |tensors: &'_ [Tensor<'_>]| tensors.iter().map(place).collect::<Vec<_>>();
            let call = Call {
                work: &step.work,
                args: super::types(&step.args).into_iter().zip(placed(&step.args)).collect(),
                results: super::types(&step.results).into_iter().zip(placed(&step.results)).collect(),
                flops: 0,
                bytes: 0,
            };
            let call = device.bind(call).unwrap();
            device.launch(call).unwrap();
            // Devices write whole words.
            for result in &step.results {
                let behind = place(result).at(result.ty.bytes() as u64);
                let rest = (4 - behind.offset % 4) % 4;
                assert!(!is_copy || rest == 0, "a copy would not leave the rest of a word alone");
                device.write(behind, &vec![0xff; rest as usize]).unwrap();
            }
        }
        let found = device.read(all, SIZE).unwrap();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "byte {i}");
        }
        (steps.len(), scratch_bytes)
    }
}

fn add() -> Kernel {
    Kernel::Map(Map { steps: vec![MapStep::Binary(Binary::Add, 0, 1)] })
}

fn f32s(n: usize) -> TensorType {
    TensorType::f32([n])
}

fn bf16s(n: usize) -> TensorType {
    TensorType::new(DType::BF16, [n])
}

#[test]
fn aligned_calls_stay_as_they_are() {
    let case = Case::new(add(), &[(f32s(5), 0), (f32s(5), 512)], &[(f32s(5), 1024)]);
    assert_eq!(case.check(512).0, 1);
}

#[test]
fn operands_at_odd_offsets_are_copied() {
    for alignment in [4, 16, 256] {
        Case::new(add(), &[(f32s(5), 4), (f32s(5), 24)], &[(f32s(5), 44)]).check(alignment);
        Case::new(add(), &[(bf16s(6), 2), (bf16s(6), 30)], &[(bf16s(6), 514)]).check(alignment);
    }
    let case = Case::new(add(), &[(f32s(5), 4), (f32s(5), 256)], &[(f32s(5), 700)]);
    assert_eq!(case.check(256).0, 3);
}

#[test]
fn a_result_that_ends_inside_a_word_leaves_its_neighbour_alone() {
    for n in 1..6 {
        Case::new(add(), &[(bf16s(n), 0), (bf16s(n), 256)], &[(bf16s(n), 512)]).check(256);
    }
}

#[test]
fn copies_move_between_any_places_at_once() {
    let copy = |shape: usize| Copy {
        shape: vec![shape],
        src_offset: 1,
        src_strides: vec![2],
        dst_offset: 2,
        dst_strides: vec![1],
    };
    for (from, to) in [(0, 512), (6, 520), (258, 2)] {
        let case = Case::new(Kernel::Copy(copy(3)), &[(bf16s(7), from)], &[(bf16s(5), to)]);
        assert_eq!(case.check(256).0, 1);
    }
}

/// A fused call of maps and norms, each described by its kernel and operands.
fn fused(parts: Vec<(Kernel, Vec<Source>)>, ty: &TensorType, stored: &[u32]) -> Work {
    let parts = parts.into_iter().map(|(kernel, sources)| Part {
        kernel,
        args: sources.into_iter().map(|source| PartArg { source, ty: ty.clone() }).collect(),
        result: ty.clone(),
    });
    Work::Fused(Fused { pattern: "test".into(), parts: parts.collect(), stored: stored.to_vec() })
}

#[test]
fn fused_calls_stay_whole() {
    use Source::{Operand, Part};
    let ty = TensorType::f32([3, 4]);
    let abs = || Kernel::Map(Map { steps: vec![MapStep::Unary(Unary::Abs, 0)] });
    let parts = vec![(add(), vec![Operand(0), Operand(1)]), (abs(), vec![Part(0)]), (add(), vec![Part(1), Operand(0)])];
    let work = fused(parts, &ty, &[2, 0]);
    let places = [(ty.clone(), 0), (ty.clone(), 256)];
    let aligned = Case::new(work.clone(), &places, &[(ty.clone(), 512), (ty.clone(), 1024)]);
    assert_eq!([aligned.check(4).0, aligned.check(256).0], [1, 1]);
    let odd = Case::new(work.clone(), &places, &[(ty.clone(), 516), (ty.clone(), 1028)]);
    assert_eq!([odd.check(4).0, odd.check(256).0], [1, 3]);
    // A result over an operand of its own.
    for alignment in [4, 256] {
        Case::new(work.clone(), &places, &[(ty.clone(), 0), (ty.clone(), 512)]).check(alignment);
        let moved = [(ty.clone(), 4), (ty.clone(), 260)];
        Case::new(work.clone(), &moved, &[(ty.clone(), 4), (ty.clone(), 516)]).check(alignment);
    }
}

#[test]
fn results_of_fused_calls_leave_their_neighbours_alone() {
    let parts = || vec![(add(), vec![Source::Operand(0), Source::Operand(1)]), (add(), vec![Source::Part(0); 2])];
    for n in 1..6 {
        let ty = bf16s(n);
        let results = [(ty.clone(), 512), (ty.clone(), 768)];
        Case::new(fused(parts(), &ty, &[1, 0]), &[(ty.clone(), 2), (ty.clone(), 256)], &results).check(256);
    }
}

#[test]
fn empty_results_take_no_step() {
    let norm = Kernel::RmsNorm(RmsNorm { eps: Float(1e-6) });
    let case = Case::new(norm, &[(TensorType::f32([0, 4]), 0)], &[(TensorType::f32([0, 4]), 512)]);
    assert_eq!(case.check(256).0, 0);
}
