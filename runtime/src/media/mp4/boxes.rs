//! The boxes of an MP4 file, one function each (ISO/IEC 14496-12, -14 and -15).

use super::{AudioTrack, MediaError, VideoTrack, fit};

/// A box under construction; its length is filled in by [`BoxWriter::close`].
pub(super) struct BoxWriter {
    bytes: Vec<u8>,
}

impl BoxWriter {
    pub(super) fn open(name: &[u8; 4]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(name);
        Self { bytes }
    }

    /// A box with version and flags.
    fn full(name: &[u8; 4], version: u8, flags: u32) -> Self {
        Self::open(name).u32(u32::from(version) << 24 | flags)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_be_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_be_bytes())
    }

    fn zeros(self, len: usize) -> Self {
        self.bytes(&[0; 32][..len])
    }

    pub(super) fn child(&mut self, child: Self) -> Result<(), MediaError> {
        self.bytes.extend(child.close()?);
        Ok(())
    }

    pub(super) fn close(mut self) -> Result<Vec<u8>, MediaError> {
        let len: u32 = fit("box length", self.bytes.len() as u64)?;
        self.bytes[..4].copy_from_slice(&len.to_be_bytes());
        Ok(self.bytes)
    }
}

/// The identity matrix of picture placement.
const MATRIX: [u32; 9] = [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30];

fn matrix(mut dst: BoxWriter) -> BoxWriter {
    for value in MATRIX {
        dst = dst.u32(value);
    }
    dst
}

pub(super) fn ftyp() -> Vec<u8> {
    let ftyp = BoxWriter::open(b"ftyp").bytes(b"isom").u32(0x200).bytes(b"isomiso2avc1mp41");
    ftyp.close().expect("constant length")
}

/// Header of the box that holds `data_len` bytes of samples.
pub(super) fn mdat_header(dst: &mut Vec<u8>, data_len: u64, is_wide: bool) -> Result<(), MediaError> {
    if is_wide {
        let len = data_len.checked_add(16).ok_or_else(super::too_large)?;
        dst.extend(1_u32.to_be_bytes());
        dst.extend(b"mdat");
        dst.extend(len.to_be_bytes());
    } else {
        let len: u32 = fit("sample data length", data_len + 8)?;
        dst.extend(len.to_be_bytes());
        dst.extend(b"mdat");
    }
    Ok(())
}

pub(super) fn mvhd(ticks_per_second: u32, duration: u32, next_track: u32) -> BoxWriter {
    let mvhd = BoxWriter::full(b"mvhd", 0, 0).zeros(8).u32(ticks_per_second).u32(duration);
    matrix(mvhd.u32(1 << 16).u16(1 << 8).zeros(10)).zeros(24).u32(next_track)
}

/// `size` is that of the picture; sound has none, but a volume.
pub(super) fn tkhd(id: u32, duration: u32, size: Option<(u16, u16)>) -> BoxWriter {
    const ENABLED_IN_MOVIE: u32 = 3;
    let (group, volume) = if size.is_some() { (0, 0) } else { (1, 1 << 8) };
    let (width, height) = size.unwrap_or_default();
    let tkhd = BoxWriter::full(b"tkhd", 0, ENABLED_IN_MOVIE).zeros(8).u32(id).zeros(4).u32(duration).zeros(8);
    matrix(tkhd.u16(0).u16(group).u16(volume).u16(0)).u32(u32::from(width) << 16).u32(u32::from(height) << 16)
}

/// Presents `duration` movie ticks of the track from its tick `start` on.
pub(super) fn edts(duration: u32, start: u32) -> Result<BoxWriter, MediaError> {
    // The field is signed; -1 would mean an empty edit.
    if i32::try_from(start).is_err() {
        return Err(MediaError::limit("number of priming samples", start, "it must be below 2^31"));
    }
    let mut edts = BoxWriter::open(b"edts");
    edts.child(BoxWriter::full(b"elst", 0, 0).u32(1).u32(duration).u32(start).u16(1).u16(0))?;
    Ok(edts)
}

pub(super) fn mdhd(ticks_per_second: u32, duration: u32) -> BoxWriter {
    const UNDETERMINED: u16 = 0x55c4;
    BoxWriter::full(b"mdhd", 0, 0).zeros(8).u32(ticks_per_second).u32(duration).u16(UNDETERMINED).u16(0)
}

pub(super) fn hdlr(kind: &[u8; 4], name: &[u8]) -> BoxWriter {
    BoxWriter::full(b"hdlr", 0, 0).u32(0).bytes(kind).zeros(12).bytes(name)
}

pub(super) fn vmhd() -> BoxWriter {
    BoxWriter::full(b"vmhd", 0, 1).zeros(8)
}

pub(super) fn smhd() -> BoxWriter {
    BoxWriter::full(b"smhd", 0, 0).zeros(4)
}

pub(super) fn minf(media_header: BoxWriter, stbl: BoxWriter) -> Result<BoxWriter, MediaError> {
    const IN_THIS_FILE: u32 = 1;
    let mut dref = BoxWriter::full(b"dref", 0, 0).u32(1);
    dref.child(BoxWriter::full(b"url ", 0, IN_THIS_FILE))?;
    let mut dinf = BoxWriter::open(b"dinf");
    dinf.child(dref)?;
    let mut minf = BoxWriter::open(b"minf");
    minf.child(media_header)?;
    minf.child(dinf)?;
    minf.child(stbl)?;
    Ok(minf)
}

/// `stsd` of a video track.
pub(super) fn avc1(track: &VideoTrack) -> Result<BoxWriter, MediaError> {
    let mut avc1 = BoxWriter::open(b"avc1").zeros(6).u16(1).zeros(16).u16(track.width).u16(track.height);
    // 72 dots per inch, one frame per sample, no compressor name, 24 bits, no colour table.
    avc1 = avc1.u32(72 << 16).u32(72 << 16).u32(0).u16(1).zeros(32).u16(24).u16(0xffff);

    let sps_len: u16 = fit("parameter set", track.sps.len() as u64)?;
    let pps_len: u16 = fit("parameter set", track.pps.len() as u64)?;
    // Version 1, profile, compatibility and level from the set, 4-byte lengths, one set of each kind.
    let avcc = BoxWriter::open(b"avcC").u8(1).bytes(&track.sps[1..4]).u8(0xff).u8(0xe1);
    let mut avcc = avcc.u16(sps_len).bytes(&track.sps).u8(1).u16(pps_len).bytes(&track.pps);
    const HIGH_PROFILES: [u8; 4] = [100, 110, 122, 144];
    if HIGH_PROFILES.contains(&track.sps[1]) {
        // 4:2:0, 8 bits of luma and chroma, no extension sets.
        avcc = avcc.bytes(&[0xfd, 0xf8, 0xf8, 0]);
    }
    avc1.child(avcc)?;
    const BT709: u16 = 1;
    const LIMITED_RANGE: u8 = 0;
    let colr = BoxWriter::open(b"colr").bytes(b"nclx").u16(BT709).u16(BT709).u16(BT709).u8(LIMITED_RANGE);
    avc1.child(colr)?;
    avc1.child(BoxWriter::open(b"pasp").u32(1).u32(1))?;
    stsd(avc1)
}

/// `stsd` of an audio track with `data_len` bytes over `duration` samples.
pub(super) fn mp4a(track: &AudioTrack, rate_hz: u16, data_len: u64, duration: u32) -> Result<BoxWriter, MediaError> {
    let bits_per_second = u128::from(data_len) * 8 * u128::from(rate_hz) / u128::from(duration.max(1));
    let bits_per_second = u32::try_from(bits_per_second).unwrap_or(u32::MAX);
    let config = descriptor(0x05, &track.config)?;
    // AAC, audio stream, no decoder buffer size, maximum and average rate.
    let mut decoder = vec![0x40, 0x15, 0, 0, 0];
    decoder.extend(bits_per_second.to_be_bytes());
    decoder.extend(bits_per_second.to_be_bytes());
    decoder.extend(config);
    // Stream number and flags 0, the decoder, the constant sync-layer description of MP4.
    let mut stream = vec![0, 0, 0];
    stream.extend(descriptor(0x04, &decoder)?);
    stream.extend(descriptor(0x06, &[0x02])?);
    let esds = BoxWriter::full(b"esds", 0, 0).bytes(&descriptor(0x03, &stream)?);

    let mut mp4a = BoxWriter::open(b"mp4a").zeros(6).u16(1).zeros(8).u16(track.channels).u16(16).zeros(4);
    mp4a = mp4a.u32(u32::from(rate_hz) << 16);
    mp4a.child(esds)?;
    stsd(mp4a)
}

/// An MPEG-4 descriptor; these are all short.
fn descriptor(tag: u8, body: &[u8]) -> Result<Vec<u8>, MediaError> {
    if body.len() > 127 {
        return Err(MediaError::limit("audio configuration length", body.len(), "at most 80 bytes are supported"));
    }
    let mut bytes = vec![tag, body.len() as u8];
    bytes.extend(body);
    Ok(bytes)
}

fn stsd(entry: BoxWriter) -> Result<BoxWriter, MediaError> {
    let mut stsd = BoxWriter::full(b"stsd", 0, 0).u32(1);
    stsd.child(entry)?;
    Ok(stsd)
}

/// Runs of (number of samples, ticks of each).
pub(super) fn stts(runs: &[(u32, u32)]) -> BoxWriter {
    let mut stts = BoxWriter::full(b"stts", 0, 0).u32(runs.len() as u32);
    for (len, ticks) in runs {
        stts = stts.u32(*len).u32(*ticks);
    }
    stts
}

/// A counted list.
pub(super) fn numbers(name: &[u8; 4], values: &[u32]) -> Result<BoxWriter, MediaError> {
    let mut list = BoxWriter::full(name, 0, 0).u32(fit("list length", values.len() as u64)?);
    for value in values {
        list = list.u32(*value);
    }
    Ok(list)
}

/// Runs of (first chunk, counted from 1; samples in each chunk).
pub(super) fn stsc(runs: &[(u32, u32)]) -> Result<BoxWriter, MediaError> {
    let mut stsc = BoxWriter::full(b"stsc", 0, 0).u32(fit("number of chunks", runs.len() as u64)?);
    for (first, len) in runs {
        stsc = stsc.u32(*first).u32(*len).u32(1);
    }
    Ok(stsc)
}

pub(super) fn stsz(sizes: &[u64]) -> Result<BoxWriter, MediaError> {
    const SIZES_DIFFER: u32 = 0;
    let mut stsz = BoxWriter::full(b"stsz", 0, 0).u32(SIZES_DIFFER).u32(fit("number of samples", sizes.len() as u64)?);
    for size in sizes {
        stsz = stsz.u32(fit("sample size", *size)?);
    }
    Ok(stsz)
}

pub(super) fn chunk_offsets(offsets: &[u64], is_wide: bool) -> Result<BoxWriter, MediaError> {
    let name = if is_wide { b"co64" } else { b"stco" };
    let mut list = BoxWriter::full(name, 0, 0).u32(fit("number of chunks", offsets.len() as u64)?);
    for offset in offsets {
        list = if is_wide { list.bytes(&offset.to_be_bytes()) } else { list.u32(fit("offset", *offset)?) };
    }
    Ok(list)
}

/// Says that an AAC frame is right only when the one before it was decoded too.
pub(super) fn sgpd_roll() -> BoxWriter {
    BoxWriter::full(b"sgpd", 1, 0).bytes(b"roll").u32(2).u32(1).u16(u16::MAX)
}

/// Applies [`sgpd_roll`] to all samples.
pub(super) fn sbgp_roll(samples: u32) -> BoxWriter {
    BoxWriter::full(b"sbgp", 0, 0).bytes(b"roll").u32(1).u32(samples).u32(1)
}

/// Names of tags that players show, with their four-letter codes.
pub(super) const KNOWN_TAGS: [(&str, &[u8; 4]); 3] =
    [("encoder", b"\xa9too"), ("comment", b"\xa9cmt"), ("title", b"\xa9nam")];

/// Owner of the free-form tags.
const TAG_OWNER: &[u8] = b"com.apple.iTunes";

/// `udta` with the tags in the form that iTunes introduced.
pub(super) fn udta(tags: &[(String, String)]) -> Result<BoxWriter, MediaError> {
    let mut ilst = BoxWriter::open(b"ilst");
    for (name, value) in tags {
        let known = KNOWN_TAGS.iter().find(|(known, _)| known == name);
        let mut item = BoxWriter::open(known.map_or(b"----", |(_, code)| code));
        if known.is_none() {
            item.child(BoxWriter::full(b"mean", 0, 0).bytes(TAG_OWNER))?;
            item.child(BoxWriter::full(b"name", 0, 0).bytes(name.as_bytes()))?;
        }
        const UTF8: u32 = 1;
        item.child(BoxWriter::full(b"data", 0, UTF8).u32(0).bytes(value.as_bytes()))?;
        ilst.child(item)?;
    }
    let mut meta = BoxWriter::full(b"meta", 0, 0);
    meta.child(BoxWriter::full(b"hdlr", 0, 0).u32(0).bytes(b"mdirappl").zeros(9))?;
    meta.child(ilst)?;
    let mut udta = BoxWriter::open(b"udta");
    udta.child(meta)?;
    Ok(udta)
}
