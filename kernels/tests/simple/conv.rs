//! Convolutions against the reference evaluator.

use ltxc_ir::DType;

use super::cases::Convolution;
use super::harness::Random;

#[track_caller]
pub fn check(case: Convolution) {
    assert!(case.check(7), "{case:?} is refused");
}

#[test]
fn kernels_of_video_match() {
    let cube = |input: [usize; 3], ci, co| Convolution {
        input: input.into(),
        kernel: vec![3; 3],
        stride: vec![1; 3],
        dilation: vec![1; 3],
        pad: vec![(0, 0), (1, 1), (1, 1)],
        ..Convolution::line(0, 0, ci, co)
    };
    check(cube([5, 7, 9], 16, 8));
    check(cube([3, 5, 4], 130, 40));
    check(cube([4, 17, 19], 3, 33));
    check(Convolution { stride: vec![2, 2, 2], ..cube([7, 8, 9], 6, 5) });
    check(Convolution { stride: vec![1, 2, 2], dtypes: (DType::F32, DType::BF16), ..cube([3, 8, 9], 12, 64) });
    check(Convolution { dtypes: (DType::BF16, DType::BF16), ..cube([3, 6, 7], 31, 17) });
    check(Convolution { kernel: vec![1; 3], pad: vec![(0, 0); 3], ..cube([3, 6, 7], 31, 17) });
}

/// Every value is read once.
#[test]
fn patches_of_images_match() {
    for (side, patch, co) in [(56, 14, 40), (21, 7, 33)] {
        for dtype in [DType::F32, DType::BF16] {
            check(Convolution {
                input: vec![side; 2],
                kernel: vec![patch; 2],
                stride: vec![patch; 2],
                dilation: vec![1; 2],
                pad: vec![(0, 0); 2],
                dtypes: (dtype, DType::BF16),
                ..Convolution::line(0, 0, 3, co)
            });
        }
    }
}

/// Blocks of the reduction end inside taps, rows and columns end inside blocks.
#[test]
fn long_sums_match() {
    check(Convolution::line(300, 3, 200, 40));
    check(Convolution::line(16, 7, 385, 20));
    check(Convolution { dilation: vec![5], pad: vec![(15, 15)], ..Convolution::line(101, 7, 60, 33) });
    check(Convolution { stride: vec![80], pad: vec![(150, 0)], ..Convolution::line(1000, 256, 1, 66) });
}

#[test]
fn everything_is_padding() {
    check(Convolution { pad: vec![(9, 9)], dilation: vec![6], ..Convolution::line(2, 3, 4, 5) });
    check(Convolution { pad: vec![(9, 9)], dilation: vec![6], groups: 40, ..Convolution::line(2, 3, 1, 1) });
    check(Convolution { pad: vec![(40, 3)], stride: vec![11], ..Convolution::line(5, 2, 3, 3) });
}

#[test]
fn channels_with_kernels_of_their_own_match() {
    for c in [1, 2, 3, 5, 24, 33, 64, 100] {
        let filter = Convolution { groups: c, ..Convolution::line(150, 12, 1, 1) };
        check(filter.clone());
        check(Convolution { stride: vec![2], pad: vec![(5, 6)], batch: 2, ..filter.clone() });
        check(Convolution {
            dilation: vec![3],
            pad: vec![(4, 0)],
            dtypes: (DType::BF16, DType::F16),
            ..filter.clone()
        });
        check(Convolution { transpose: true, stride: vec![2], pad: vec![(15, 15)], ..filter.clone() });
        check(Convolution { transpose: true, stride: vec![3], dtypes: (DType::F16, DType::F32), ..filter });
    }
    let square = |input: usize, stride| Convolution {
        input: vec![input; 2],
        kernel: vec![5; 2],
        stride: vec![stride; 2],
        dilation: vec![1; 2],
        pad: vec![(2, 2); 2],
        groups: 20,
        ..Convolution::line(0, 0, 1, 1)
    };
    check(square(9, 1));
    check(square(30, 2));
    check(Convolution { transpose: true, ..square(7, 2) });
    check(Convolution { transpose: true, ..square(3, 7) });
}

#[test]
fn transposed_kernels_of_audio_match() {
    let up = |t, kernel, rate, ci, co| Convolution {
        transpose: true,
        stride: vec![rate],
        pad: vec![((kernel - rate) / 2, (kernel - rate) / 2)],
        ..Convolution::line(t, kernel, ci, co)
    };
    check(up(21, 16, 6, 50, 30));
    check(up(40, 11, 5, 33, 17));
    check(up(1, 4, 2, 8, 8));
    check(up(100, 4, 2, 400, 24));
    check(Convolution { dtypes: (DType::F32, DType::BF16), ..up(30, 15, 5, 64, 32) });
    // Some phases are reached by no tap.
    check(Convolution { transpose: true, stride: vec![5], ..Convolution::line(9, 2, 3, 4) });
    check(Convolution { transpose: true, stride: vec![4], dilation: vec![2], ..Convolution::line(9, 3, 3, 4) });
    check(Convolution {
        transpose: true,
        stride: vec![4],
        dilation: vec![2],
        groups: 7,
        ..Convolution::line(9, 3, 1, 1)
    });
}

#[test]
fn random_cases_match() {
    let mut random = Random(61);
    let mut checked = 0;
    for seed in 0..600 {
        let n = 1 + random.below(3);
        let mut each = |from: &[usize]| (0..n).map(|_| random.pick(from)).collect::<Vec<_>>();
        let (input, kernel) = (each(&[1, 2, 3, 5, 8, 11, 13]), each(&[1, 2, 3, 4, 5, 7]));
        let (stride, dilation) = (each(&[1, 1, 2, 3, 5]), each(&[1, 1, 2, 3]));
        let pad = each(&[0, 0, 1, 2, 4]).into_iter().zip(each(&[0, 0, 1, 3, 5])).collect();
        let dtypes = [DType::F32, DType::F32, DType::BF16, DType::F16, DType::F8E4M3];
        let case = Convolution {
            transpose: random.below(2) == 0,
            batch: random.pick(&[1, 1, 2, 3]),
            input,
            kernel,
            stride,
            dilation,
            pad,
            groups: random.pick(&[1, 1, 2, 3, 8]),
            channels: random.pick(&[(1, 1), (1, 1), (1, 2), (3, 1), (4, 4), (7, 5), (2, 33)]),
            dtypes: (random.pick(&dtypes[..4]), random.pick(&dtypes)),
        };
        checked += usize::from(case.check(seed));
    }
    assert!(checked > 300, "{checked} cases are accepted");
}

/// Large enough that threads share the work.
#[test]
fn shared_work_gives_the_same_bytes() {
    let case = Convolution {
        input: vec![4, 30, 20],
        kernel: vec![2, 3, 3],
        stride: vec![1; 3],
        dilation: vec![1; 3],
        pad: vec![(0, 0), (1, 1), (1, 1)],
        ..Convolution::line(0, 0, 20, 36)
    };
    check(case.clone());
    check(Convolution { dtypes: (DType::BF16, DType::BF16), ..case.clone() });
    check(Convolution { transpose: true, stride: vec![1, 2, 2], ..case });
    check(Convolution { groups: 48, stride: vec![2], ..Convolution::line(3000, 12, 1, 1) });
    check(Convolution {
        transpose: true,
        groups: 48,
        stride: vec![2],
        pad: vec![(5, 5)],
        ..Convolution::line(3000, 12, 1, 1)
    });
}
