//! Reader of MP4 and MOV files of any origin: where the H.264 pictures lie, when each is shown, and how.
//!
//! It reads the boxes that it needs and skips all others. Files are not trusted: every offset is checked, no table is
//! larger than the bytes it is made from, and arithmetic is checked or wider than its operands.
//!
//! # Easy to get wrong
//! - Pictures are stored in decoding order; composition offsets say when each is shown.
//! - An edit list moves time zero: encoders with reordered pictures, and all AAC encoders, start before it.
//! - A box of length 0 reaches to the end of the file.
//!
//! Source: ISO/IEC 14496-12, 14496-15.

use std::ops::Range;

use super::cursor::{Cursor, counted};
use crate::media::MediaError;
use crate::media::colour::Colour;

/// What of a file concerns us.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Source {
    /// The first H.264 track, or why there is none that can be read.
    pub video: Option<Result<H264Track, String>>,
    /// The edit of every sound track.
    pub sounds: Vec<SoundEdit>,
}

/// An H.264 track.
#[derive(Debug, Clone, PartialEq)]
pub struct H264Track {
    /// Sequence and picture parameter sets, without start codes.
    pub parameter_sets: Vec<Vec<u8>>,
    /// Bytes of the length in front of every NAL unit, 1 to 4.
    pub length_bytes: usize,
    /// Quarter turns clockwise that the pictures need.
    pub quarter_turns: u8,
    /// Colours as the file declares them.
    pub colour: Option<Colour>,
    /// Ticks of a second.
    pub ticks_per_second: u32,
    /// Pictures in decoding order; at least one.
    pub samples: Vec<Sample>,
}

/// A coded picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Its bytes in the file.
    pub bytes: Range<usize>,
    /// When it is shown, in ticks.
    pub time: i64,
    /// Whether the edit list shows it at all.
    pub is_shown: bool,
    /// How long it is shown, in ticks.
    pub duration: u32,
}

/// Which part of a sound track is heard.
#[derive(Debug, Clone, PartialEq)]
pub struct SoundEdit {
    /// Number of the track.
    pub track: u32,
    /// Seconds of decoded sound before the first that is heard.
    pub skip_seconds: f64,
    /// Seconds that are heard; `None` for all.
    pub length_seconds: Option<f64>,
    /// Seconds of silence in front.
    pub delay_seconds: f64,
}

/// Reads a file.
///
/// `None` if it is no MP4 or MOV file at all.
///
/// # Errors
/// [`MediaError::Mp4`] if it is damaged.
pub fn demux(file: &[u8]) -> Result<Option<Source>, MediaError> {
    const OPENING: [&[u8; 4]; 6] = [b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"];
    if !file.get(4..8).is_some_and(|name| OPENING.iter().any(|known| name == *known)) {
        return Ok(None);
    }
    let mut top = Cursor::new(file);
    let mut source = None;
    while let Some((name, body)) = next_in_file(&mut top)? {
        match &name {
            b"moov" => source = Some(movie(body, file.len())?),
            b"moof" => {
                let reason = "it is fragmented".to_owned();
                return Ok(Some(Source { video: Some(Err(reason)), sounds: Vec::new() }));
            }
            _ => {}
        }
    }
    source.map(Some).ok_or_else(|| top.error("there is no `moov` box; the file is cut or was never completed"))
}

/// The next box of the file itself.
fn next_in_file<'a>(top: &mut Cursor<'a>) -> Result<Option<([u8; 4], Cursor<'a>)>, MediaError> {
    // A few bytes behind the last box are a common flaw.
    if top.end - top.at < 8 {
        return Ok(None);
    }
    let mut peek = top.clone();
    let (len, name) = (peek.u32()?, peek.array()?);
    if len == 0 {
        top.at = top.end;
        return Ok(Some((name, peek)));
    }
    let at = top.at;
    top.next().map_err(|_| {
        let problem = format!("box `{}` reaches beyond the end; the file is cut", name.escape_ascii());
        MediaError::Mp4 { problem, offset: at as u64 }
    })
}

/// The boxes within a box. A rest too short for one is a terminator, as QuickTime writes it.
fn children(mut body: Cursor<'_>) -> Result<Vec<([u8; 4], Cursor<'_>)>, MediaError> {
    let mut found = Vec::new();
    while body.end - body.at >= 8 {
        match body.next()? {
            Some(child) => found.push(child),
            None => break,
        }
    }
    Ok(found)
}

/// The first box of a name.
fn find<'a>(boxes: &[([u8; 4], Cursor<'a>)], name: &[u8; 4]) -> Option<Cursor<'a>> {
    boxes.iter().find(|(found, _)| found == name).map(|(_, body)| body.clone())
}

/// The first box of a name, which must be there.
fn need<'a>(boxes: &[([u8; 4], Cursor<'a>)], name: &[u8; 4], within: &Cursor<'_>) -> Result<Cursor<'a>, MediaError> {
    find(boxes, name).ok_or_else(|| within.error(format!("box `{}` is missing", name.escape_ascii())))
}

fn movie(moov: Cursor<'_>, file_len: usize) -> Result<Source, MediaError> {
    let boxes = children(moov.clone())?;
    let mut header = need(&boxes, b"mvhd", &moov)?;
    let movie_ticks = ticks_per_second(&mut header)?;
    let mut source = Source::default();
    if find(&boxes, b"mvex").is_some() {
        source.video = Some(Err("it is fragmented".to_owned()));
    }
    for (_, trak) in boxes.iter().filter(|(name, _)| name == b"trak") {
        track(trak, movie_ticks, file_len, &mut source)?;
    }
    Ok(source)
}

/// The time scale in the header of a movie or track.
fn ticks_per_second(header: &mut Cursor<'_>) -> Result<u32, MediaError> {
    let version = header.u32()? >> 24;
    header.take(if version == 1 { 16 } else { 8 })?;
    let ticks = header.u32()?;
    if ticks == 0 { Err(header.error("a second has no ticks")) } else { Ok(ticks) }
}

fn track(trak: &Cursor<'_>, movie_ticks: u32, file_len: usize, source: &mut Source) -> Result<(), MediaError> {
    let boxes = children(trak.clone())?;
    let mdia = need(&boxes, b"mdia", trak)?;
    let media = children(mdia.clone())?;
    let mut handler = need(&media, b"hdlr", &mdia)?;
    handler.take(8)?;
    let kind: [u8; 4] = handler.array()?;
    if !matches!(&kind, b"vide" | b"soun") {
        return Ok(());
    }
    let (number, quarter_turns) = track_header(need(&boxes, b"tkhd", trak)?)?;
    let ticks = ticks_per_second(&mut need(&media, b"mdhd", &mdia)?)?;
    let edit = match find(&boxes, b"edts").map(children).transpose()? {
        Some(edts) => match find(&edts, b"elst") {
            Some(elst) => edit(elst)?,
            None => Edit::NONE,
        },
        None => Edit::NONE,
    };
    let seconds = |n: u64| n as f64 / f64::from(movie_ticks);
    if &kind == b"soun" {
        source.sounds.push(SoundEdit {
            track: number,
            skip_seconds: edit.start as f64 / f64::from(ticks),
            length_seconds: edit.length.map(seconds),
            delay_seconds: seconds(edit.delay),
        });
        return Ok(());
    }
    if matches!(source.video, Some(Ok(_))) {
        return Ok(());
    }
    let minf = need(&media, b"minf", &mdia)?;
    let stbl = need(&children(minf.clone())?, b"stbl", &minf)?;
    let tables = children(stbl.clone())?;
    let mut stsd = need(&tables, b"stsd", &stbl)?;
    let track = match description(&mut stsd)? {
        Err(reason) => Err(reason),
        Ok(_) if edit.is_cut => Err("its edit list cuts or repeats parts".to_owned()),
        Ok(mut track) => {
            (track.quarter_turns, track.ticks_per_second) = (quarter_turns, ticks);
            let mut samples = samples(&tables, &stbl, file_len)?;
            let delay = i128::from(edit.delay) * i128::from(ticks) / i128::from(movie_ticks);
            let end = edit.length.map(|n| {
                i128::from(edit.start) + (i128::from(n) * i128::from(ticks)).div_euclid(i128::from(movie_ticks)) + 1
            });
            for sample in &mut samples {
                let time = i128::from(sample.time);
                sample.is_shown = time >= i128::from(edit.start) && end.is_none_or(|end| time < end);
                let time = i64::try_from(time - i128::from(edit.start) + delay);
                sample.time = time.map_err(|_| stbl.error("a picture has an impossible time"))?;
            }
            if samples.is_empty() {
                return Err(stbl.error("the video track has no pictures"));
            }
            track.samples = samples;
            Ok(track)
        }
    };
    if track.is_ok() || source.video.is_none() {
        source.video = Some(track);
    }
    Ok(())
}

/// Number of the track, and the quarter turns of its matrix.
fn track_header(mut tkhd: Cursor<'_>) -> Result<(u32, u8), MediaError> {
    let version = tkhd.u32()? >> 24;
    tkhd.take(if version == 1 { 16 } else { 8 })?;
    let number = tkhd.u32()?;
    tkhd.take(if version == 1 { 28 } else { 24 })?;
    // Rows (a, b, u), (c, d, v) of a matrix that maps a column (x, y); 16.16 except u and v.
    let [a, b, _, c, d] =
        [tkhd.u32()?, tkhd.u32()?, tkhd.u32()?, tkhd.u32()?, tkhd.u32()?].map(|n| (n as i32).signum());
    let turns = match [a, b, c, d] {
        [0, 1, -1, 0] => 1,
        [-1, 0, 0, -1] => 2,
        [0, -1, 1, 0] => 3,
        _ => 0,
    };
    Ok((number, turns))
}

/// Where a track starts.
struct Edit {
    /// Ticks of the track before the first that is shown.
    start: u64,
    /// Ticks of the movie that are shown; `None` for all.
    length: Option<u64>,
    /// Ticks of the movie with nothing in front.
    delay: u64,
    /// Whether there is more than one part, or one at another speed.
    is_cut: bool,
}

impl Edit {
    const NONE: Edit = Edit { start: 0, length: None, delay: 0, is_cut: false };
}

fn edit(mut elst: Cursor<'_>) -> Result<Edit, MediaError> {
    let version = elst.u32()? >> 24;
    let entries = counted(&mut elst, |c| {
        let (length, start) = match version {
            1 => (c.u64()?, c.u64()? as i64),
            _ => (u64::from(c.u32()?), i64::from(c.u32()? as i32)),
        };
        Ok((length, start, c.u32()?))
    })?;
    const NORMAL_SPEED: u32 = 1 << 16;
    let mut edit = Edit::NONE;
    let mut parts = 0;
    for (length, start, speed) in entries {
        match u64::try_from(start) {
            Err(_) if parts == 0 => edit.delay = edit.delay.saturating_add(length),
            Err(_) => edit.is_cut = true,
            Ok(start) => {
                parts += 1;
                edit.start = start;
                // A length of 0 stands for the rest of a track that was being recorded.
                edit.length = Some(length).filter(|n| *n > 0);
                edit.is_cut |= parts > 1 || speed != NORMAL_SPEED;
            }
        }
    }
    Ok(edit)
}

/// The description of the pictures, still without samples; `Err` within if they are not H.264.
fn description(stsd: &mut Cursor<'_>) -> Result<Result<H264Track, String>, MediaError> {
    stsd.take(4)?;
    let count = stsd.u32()?;
    let Some((name, mut entry)) = stsd.next()? else { return Err(stsd.error("there is no sample description")) };
    if !matches!(&name, b"avc1" | b"avc3") {
        return Ok(Err(format!("its pictures are `{}`, not H.264", name.escape_ascii())));
    }
    if count != 1 {
        return Ok(Err(format!("it has {count} descriptions of its pictures")));
    }
    entry.take(78)?;
    let boxes = children(entry.clone())?;
    let mut avcc = need(&boxes, b"avcC", &entry)?;
    avcc.take(4)?;
    let length_bytes = usize::from(avcc.u8()? & 3) + 1;
    let mut parameter_sets = Vec::new();
    for mask in [31, 255] {
        for _ in 0..avcc.u8()? & mask {
            let len = avcc.u16()?;
            parameter_sets.push(avcc.take(len.into())?.to_vec());
        }
    }
    let colour = find(&boxes, b"colr").map(colour).transpose()?.flatten();
    Ok(Ok(H264Track {
        parameter_sets,
        length_bytes,
        quarter_turns: 0,
        colour,
        ticks_per_second: 1,
        samples: Vec::new(),
    }))
}

fn colour(mut colr: Cursor<'_>) -> Result<Option<Colour>, MediaError> {
    let kind: [u8; 4] = colr.array()?;
    if !matches!(&kind, b"nclx" | b"nclc") {
        return Ok(None);
    }
    colr.take(4)?;
    let matrix = colr.u16()?;
    // Only `nclx` has the range.
    let is_full_range = &kind == b"nclx" && colr.u8()? >> 7 == 1;
    Ok(u8::try_from(matrix).ok().and_then(|matrix| Colour::new(matrix, is_full_range)))
}

/// All samples, with the times that the track has before edits.
fn samples(tables: &[([u8; 4], Cursor<'_>)], stbl: &Cursor<'_>, file_len: usize) -> Result<Vec<Sample>, MediaError> {
    let sizes = sizes(tables, stbl, file_len)?;
    let table = |name: &[u8; 4]| -> Result<Option<Cursor<'_>>, MediaError> {
        let Some(mut body) = find(tables, name) else { return Ok(None) };
        body.take(4)?;
        Ok(Some(body))
    };
    let missing = |name: &str| stbl.error(format!("box `{name}` is missing"));
    let mut durations = table(b"stts")?.ok_or_else(|| missing("stts"))?;
    let durations = counted(&mut durations, |c| Ok((c.u32()?, c.u32()?)))?;
    let shifts = match table(b"ctts")? {
        // Version 0 says unsigned, but files with negative numbers in it are common.
        Some(mut ctts) => counted(&mut ctts, |c| Ok((c.u32()?, c.u32()? as i32)))?,
        None => Vec::new(),
    };
    let mut chunks = table(b"stsc")?.ok_or_else(|| missing("stsc"))?;
    let chunks = counted(&mut chunks, |c| Ok((c.u32()?, c.u32()?, c.u32()?)))?;
    let offsets = match (table(b"stco")?, table(b"co64")?) {
        (Some(mut stco), _) => counted(&mut stco, |c| Ok(u64::from(c.u32()?)))?,
        (None, Some(mut co64)) => counted(&mut co64, Cursor::u64)?,
        (None, None) => return Err(missing("stco")),
    };

    let mut durations = runs(durations);
    let mut shifts = runs(shifts);
    let mut samples = Vec::with_capacity(sizes.len());
    let mut sizes = sizes.into_iter().peekable();
    let mut chunks = chunks.into_iter().peekable();
    let (mut per_chunk, mut decoded_at) = (0, 0_i64);
    for (index, offset) in offsets.into_iter().enumerate() {
        if let Some((_, len, _)) = chunks.next_if(|run| run.0 as usize == index + 1) {
            per_chunk = len;
        }
        let mut at = usize::try_from(offset).unwrap_or(usize::MAX);
        for _ in 0..per_chunk {
            let Some(size) = sizes.next() else { break };
            let end = at.checked_add(size as usize).filter(|end| *end <= file_len);
            let end = end.ok_or_else(|| {
                stbl.error(format!("picture {} lies beyond the end; the file is cut", samples.len() + 1))
            })?;
            let duration = durations.next().ok_or_else(|| stbl.error("a picture has no time"))?;
            // Far below the limit: fewer than 2^32 samples of fewer than 2^32 ticks.
            let time = decoded_at + i64::from(shifts.next().unwrap_or(0));
            samples.push(Sample { bytes: at..end, time, is_shown: true, duration });
            decoded_at += i64::from(duration);
            at = end;
        }
    }
    if sizes.peek().is_some() {
        return Err(stbl.error("there are more pictures than the chunks hold"));
    }
    Ok(samples)
}

/// Most pictures of a file: two days at 24 frames per second.
const MOST_PICTURES: u32 = 1 << 22;

/// Sizes of all samples.
fn sizes(tables: &[([u8; 4], Cursor<'_>)], stbl: &Cursor<'_>, file_len: usize) -> Result<Vec<u32>, MediaError> {
    if let Some(mut stsz) = find(tables, b"stsz") {
        stsz.take(4)?;
        let size = stsz.u32()?;
        if size == 0 {
            let sizes = counted(&mut stsz, Cursor::u32)?;
            if sizes.len() > MOST_PICTURES as usize {
                return Err(stsz.error("there are too many pictures"));
            }
            return Ok(sizes);
        }
        let count = stsz.u32()?;
        if count > MOST_PICTURES || u64::from(count) * u64::from(size) > file_len as u64 {
            return Err(stsz.error("there are more pictures than the file can hold"));
        }
        return Ok(vec![size; count as usize]);
    }
    Err(stbl.error("box `stsz` is missing"))
}

/// The values of runs, one by one.
fn runs<T: Copy>(runs: Vec<(u32, T)>) -> impl Iterator<Item = T> {
    runs.into_iter().flat_map(|(count, value)| std::iter::repeat_n(value, count as usize))
}
