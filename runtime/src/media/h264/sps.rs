//! What a sequence parameter set says about pictures: whether the embedded decoder can read them, and their colours.
//!
//! Source: ITU-T H.264, 7.3.2.1.1 and Annex E.

use crate::media::colour::Colour;

/// What concerns us of a sequence parameter set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sps {
    /// Why the embedded decoder cannot read the stream, if it cannot.
    pub unsupported: Option<&'static str>,
    /// Colours, if the stream says something about them that is understood.
    pub colour: Option<Colour>,
}

impl Sps {
    /// Reads a NAL unit without its start code; `None` if it is cut or is no sequence parameter set.
    pub fn parse(nal: &[u8]) -> Option<Sps> {
        let (&header, body) = nal.split_first()?;
        (header & 31 == 7).then_some(())?;
        let mut bits = Bits { bytes: unescape(body), at: 0 };
        let profile = bits.take(8)?;
        bits.take(16)?;
        bits.exp_golomb()?;
        let (mut chroma, mut depth) = (1, 0);
        if [100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135].contains(&profile) {
            chroma = bits.exp_golomb()?;
            if chroma == 3 {
                bits.take(1)?;
            }
            depth = bits.exp_golomb()? | bits.exp_golomb()?;
            bits.take(1)?;
            if bits.take(1)? == 1 {
                scaling_lists(&mut bits, if chroma == 3 { 12 } else { 8 })?;
            }
        }
        bits.exp_golomb()?;
        match bits.exp_golomb()? {
            0 => drop(bits.exp_golomb()?),
            1 => {
                bits.take(1)?;
                bits.exp_golomb()?;
                bits.exp_golomb()?;
                for _ in 0..bits.exp_golomb()?.min(255) {
                    bits.exp_golomb()?;
                }
            }
            _ => {}
        }
        bits.exp_golomb()?;
        bits.take(1)?;
        bits.exp_golomb()?;
        bits.exp_golomb()?;
        let is_progressive = bits.take(1)? == 1;
        if !is_progressive {
            bits.take(1)?;
        }
        bits.take(1)?;
        if bits.take(1)? == 1 {
            for _ in 0..4 {
                bits.exp_golomb()?;
            }
        }
        let colour = if bits.take(1)? == 1 { colour(&mut bits) } else { None };
        let unsupported = match (profile, chroma, depth, is_progressive) {
            (_, _, _, false) => Some("its pictures are interlaced"),
            (_, _, 1.., _) => Some("its pictures have more than 8 bits"),
            (_, 2.., _, _) => Some("its pictures are not 4:2:0"),
            (66 | 77 | 100, 0 | 1, 0, true) => None,
            _ => Some("its profile is not Baseline, Main or High"),
        };
        Some(Sps { unsupported, colour })
    }
}

/// The colour description of the usability information.
fn colour(bits: &mut Bits) -> Option<Colour> {
    const EXTENDED_ASPECT: u32 = 255;
    if bits.take(1)? == 1 && bits.take(8)? == EXTENDED_ASPECT {
        bits.take(32)?;
    }
    if bits.take(1)? == 1 {
        bits.take(1)?;
    }
    if bits.take(1)? == 0 {
        return None;
    }
    bits.take(3)?;
    let is_full_range = bits.take(1)? == 1;
    const UNSPECIFIED: u32 = 2;
    let mut matrix = UNSPECIFIED;
    if bits.take(1)? == 1 {
        bits.take(16)?;
        matrix = bits.take(8)?;
    }
    Colour::new(matrix as u8, is_full_range)
}

/// Skips lists of scaling factors.
fn scaling_lists(bits: &mut Bits, lists: usize) -> Option<()> {
    for list in 0..lists {
        if bits.take(1)? == 0 {
            continue;
        }
        let (mut last, mut next) = (8_i64, 8_i64);
        for _ in 0..if list < 6 { 16 } else { 64 } {
            if next != 0 {
                next = (last + bits.signed_exp_golomb()?).rem_euclid(256);
            }
            last = if next == 0 { last } else { next };
        }
    }
    Some(())
}

/// Without the bytes that keep start codes out of the data.
fn unescape(body: &[u8]) -> Vec<u8> {
    let mut zeros = 0;
    let keep = |byte: &&u8| {
        let is_escape = zeros >= 2 && **byte == 3;
        zeros = if **byte == 0 { zeros + 1 } else { 0 };
        !is_escape
    };
    body.iter().filter(keep).copied().collect()
}

struct Bits {
    bytes: Vec<u8>,
    at: usize,
}

impl Bits {
    /// The next `count` bits, at most 32.
    fn take(&mut self, count: usize) -> Option<u32> {
        let mut value = 0_u64;
        for _ in 0..count {
            let byte = self.bytes.get(self.at / 8)?;
            value = value << 1 | u64::from(byte >> (7 - self.at % 8) & 1);
            self.at += 1;
        }
        Some(value as u32)
    }

    fn exp_golomb(&mut self) -> Option<u32> {
        let mut zeros = 0;
        while self.take(1)? == 0 {
            zeros += 1;
            if zeros > 31 {
                return None;
            }
        }
        Some(((1_u64 << zeros) - 1) as u32 + self.take(zeros)?)
    }

    fn signed_exp_golomb(&mut self) -> Option<i64> {
        let code = i64::from(self.exp_golomb()?);
        Some(if code % 2 == 0 { -(code / 2) } else { code / 2 + 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes bits as the parser reads them.
    #[derive(Default)]
    struct Writer(Vec<bool>);

    impl Writer {
        fn put(mut self, count: usize, value: u32) -> Writer {
            self.0.extend((0..count).rev().map(|bit| value >> bit & 1 == 1));
            self
        }

        fn ue(self, value: u32) -> Writer {
            let bits = 32 - (value + 1).leading_zeros() as usize;
            self.put(bits - 1, 0).put(bits, value + 1)
        }

        fn bytes(mut self) -> Vec<u8> {
            self.0.push(true);
            let byte = |bits: &[bool]| (0..8).fold(0, |n, i| n << 1 | u8::from(bits.get(i) == Some(&true)));
            self.0.chunks(8).map(byte).collect()
        }
    }

    /// A set of 64x64 pictures: High profile with these properties, or Baseline for a chroma format of 1.
    fn sps(profile: u32, chroma: u32, depth: u32, progressive: u32, matrix: Option<(u32, u32)>) -> Vec<u8> {
        let mut w = Writer::default().put(8, 0x67).put(8, profile).put(16, 30).ue(0);
        if profile >= 100 {
            w = w.ue(chroma).ue(depth).ue(depth).put(1, 0).put(1, 0);
        }
        w = w.ue(0).ue(0).ue(2).ue(4).put(1, 0).ue(3).ue(3).put(1, progressive);
        if progressive == 0 {
            w = w.put(1, 0);
        }
        w = w.put(1, 1).put(1, 0);
        match matrix {
            None => w.put(1, 0).bytes(),
            Some((matrix, full)) => {
                w.put(1, 1).put(2, 0).put(1, 1).put(3, 5).put(1, full).put(1, 1).put(16, 0x0101).put(8, matrix).bytes()
            }
        }
    }

    #[test]
    fn colours_are_found_behind_everything_else() {
        let parsed = Sps::parse(&sps(100, 1, 0, 1, Some((1, 1)))).expect("a set");
        assert_eq!(parsed, Sps { unsupported: None, colour: Colour::new(1, true) });
        assert_eq!(Sps::parse(&sps(66, 1, 0, 1, None)).expect("a set"), Sps { unsupported: None, colour: None });
    }

    #[test]
    fn what_the_decoder_lacks_is_named() {
        let reason = |nal: Vec<u8>| Sps::parse(&nal).expect("a set").unsupported.expect("a reason");
        assert!(reason(sps(110, 1, 2, 1, None)).contains("8 bits"));
        assert!(reason(sps(122, 2, 0, 1, None)).contains("4:2:0"));
        assert!(reason(sps(77, 1, 0, 0, None)).contains("interlaced"));
        assert!(reason(sps(88, 1, 0, 1, None)).contains("profile"));
    }

    #[test]
    fn a_cut_set_is_none() {
        let whole = sps(100, 1, 0, 1, Some((1, 0)));
        assert!((0..6).all(|len| Sps::parse(&whole[..len]).is_none()));
        assert_eq!(Sps::parse(&[0x68, 1, 2, 3]), None);
    }

    #[test]
    fn escapes_are_removed() {
        assert_eq!(unescape(&[1, 0, 0, 3, 1, 0, 0, 3, 0, 0, 3]), [1, 0, 0, 1, 0, 0, 0, 0]);
    }
}
