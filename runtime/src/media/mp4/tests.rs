//! The writer against the reader, and both against nonsense.

use super::*;
use proptest::prelude::*;

fn movie(frames: usize, fps: Rational, rate_hz: u32, audible: u64) -> Movie {
    let coded = (audible + 1024).div_ceil(1024) as usize;
    Movie {
        video: Some(VideoTrack {
            width: 64,
            height: 32,
            fps,
            sps: vec![0x67, 66, 0xc0, 30, 1, 2],
            pps: vec![0x68, 1],
            samples: (0..frames).map(|i| VideoSample { data: vec![i as u8; 5 + i % 3], is_sync: i % 4 == 0 }).collect(),
        }),
        audio: Some(AudioTrack {
            rate_hz,
            channels: 2,
            config: vec![0x11, 0x90],
            priming: 1024,
            samples_per_channel: audible,
            frames: (0..coded).map(|i| vec![!(i as u8); 7 + i % 5]).collect(),
        }),
        tags: vec![
            ("encoder".to_owned(), "ltxc".to_owned()),
            ("comment".to_owned(), "ein Vögelchen 🐦".to_owned()),
            ("seed".to_owned(), "10".to_owned()),
        ],
    }
}

fn write(movie: &Movie) -> Vec<u8> {
    let mut bytes = Vec::new();
    let len = mux(movie, &mut bytes, |_| unreachable!("a vector takes all")).expect("muxed");
    assert_eq!(len, bytes.len() as u64);
    bytes
}

#[track_caller]
fn check_round_trip(movie: &Movie) {
    assert_eq!(&read(&write(movie)).expect("read"), movie);
}

#[test]
fn what_is_written_is_read() {
    check_round_trip(&movie(97, Rational::new(24000, 1001).expect("a rate"), 48_000, 193_900));
    check_round_trip(&movie(1, Rational::new(24, 1).expect("a rate"), 24_000, 1));
    check_round_trip(&movie(9, Rational::new(25, 2).expect("a rate"), 44_100, 1024));
}

#[test]
fn each_track_can_be_alone() {
    let both = movie(9, Rational::new(24, 1).expect("a rate"), 48_000, 3000);
    check_round_trip(&Movie { audio: None, ..both.clone() });
    check_round_trip(&Movie { video: None, tags: Vec::new(), ..both });
    assert!(plan(&Movie::default(), &SampleSizes::default()).is_err());
}

#[test]
fn large_files_get_wide_offsets() {
    let movie = movie(3, Rational::new(1, 1).expect("a rate"), 48_000, 3000);
    let sizes = |size| SampleSizes { video: vec![size; 3], audio: vec![9; 4] };
    let has = |header: &Header, name: &[u8]| header.bytes.windows(4).any(|window| window == name);
    let small = plan(&movie, &sizes(1 << 30)).expect("planned");
    assert!(has(&small, b"stco") && !has(&small, b"co64"));
    let large = plan(&movie, &sizes(3 << 30)).expect("planned");
    assert!(has(&large, b"co64") && !has(&large, b"stco"));
    assert_eq!(large.file_len, large.bytes.len() as u64 + (9 << 30) + 36);
}

#[test]
fn moov_precedes_the_data() {
    let bytes = write(&movie(5, Rational::new(24, 1).expect("a rate"), 48_000, 3000));
    let at = |name: &[u8]| bytes.windows(4).position(|window| window == name).expect("present");
    assert!(at(b"moov") < at(b"mdat"));
}

proptest! {
    #[test]
    fn arbitrary_lists_round_trip(frames in 1_usize..40, num in 1_u32..70_000, den in 1_u32..2000, audible in 1_u64..9000) {
        check_round_trip(&movie(frames, Rational::new(num, den).expect("positive"), 24_000, audible));
    }

    #[test]
    fn arbitrary_sizes_never_panic(
        video in proptest::collection::vec(any::<u64>(), 0..5),
        audio in proptest::collection::vec(any::<u64>(), 0..5),
        num in 1..u32::MAX, den in 1..u32::MAX, rate_hz: u32, priming: u32, audible: u64, width: u16,
    ) {
        let mut movie = movie(1, Rational::new(num, den).expect("positive"), rate_hz, 1);
        if let (Some(video), Some(audio)) = (&mut movie.video, &mut movie.audio) {
            video.width = width;
            (audio.priming, audio.samples_per_channel) = (priming, audible);
        }
        let _ = plan(&movie, &SampleSizes { video, audio });
    }

    #[test]
    fn arbitrary_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn a_damaged_file_never_panics(at in 0_usize..2000, value: u8, cut in 0_usize..4000) {
        let mut bytes = write(&movie(9, Rational::new(24, 1).expect("a rate"), 48_000, 3000));
        let at = at % bytes.len();
        bytes[at] = value;
        let _ = read(&bytes);
        bytes.truncate(cut);
        let _ = read(&bytes);
    }
}
