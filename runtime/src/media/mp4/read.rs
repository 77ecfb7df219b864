//! Strict reader of the files that [`super::mux`] writes.
//!
//! It knows the boxes of the writer and their order of nesting, ignores fields that carry no information, and answers
//! anything else with [`MediaError::Mp4`]. It never allocates more than the input's length times a small constant.

use std::ops::Range;

use super::boxes::KNOWN_TAGS;
use super::cursor::{Cursor, list};
use super::{AudioTrack, Movie, VideoSample, VideoTrack};
use crate::media::{MediaError, Rational};

/// Reads a file written by [`super::mux`].
///
/// # Errors
/// [`MediaError::Mp4`] if `bytes` is anything else.
pub fn read(bytes: &[u8]) -> Result<Movie, MediaError> {
    let mut file = Cursor::new(bytes);
    file.child(b"ftyp")?;
    let mut moov = file.child(b"moov")?;
    let data = file.child(b"mdat")?;
    file.finish()?;

    let mut movie = Movie::default();
    moov.child(b"mvhd")?;
    while let Some((name, mut body)) = moov.next()? {
        match &name {
            b"trak" => track(&mut body, bytes, data.at..data.end, &mut movie)?,
            b"udta" => movie.tags = tags(&mut body)?,
            _ => return Err(body.error("unknown box in `moov`")),
        }
    }
    Ok(movie)
}

fn track(trak: &mut Cursor<'_>, file: &[u8], data: Range<usize>, movie: &mut Movie) -> Result<(), MediaError> {
    trak.full(b"tkhd", 0)?;
    let mut edit = None;
    if trak.bytes.get(trak.at + 4..trak.at + 8) == Some(b"edts") {
        let mut elst = trak.child(b"edts")?.full(b"elst", 0)?;
        elst.expect("number of edits", elst.clone().u32()?, 1)?;
        elst.take(4)?;
        edit = Some((elst.u32()?, elst.u32()?));
    }
    let mut mdia = trak.child(b"mdia")?;
    trak.finish()?;
    let mut mdhd = mdia.full(b"mdhd", 0)?;
    mdhd.take(8)?;
    let (ticks_per_second, duration) = (mdhd.u32()?, mdhd.u32()?);
    let mut hdlr = mdia.full(b"hdlr", 0)?;
    hdlr.take(4)?;
    let kind: [u8; 4] = hdlr.array()?;
    let mut minf = mdia.child(b"minf")?;
    mdia.finish()?;
    minf.next()?;
    minf.child(b"dinf")?;
    let mut stbl = minf.child(b"stbl")?;
    minf.finish()?;
    let mut stsd = stbl.full(b"stsd", 0)?;
    stsd.expect("number of sample descriptions", stsd.clone().u32()?, 1)?;
    stsd.take(4)?;

    match (&kind, edit) {
        (b"vide", None) if movie.video.is_none() => {
            let table = SampleTable::read(&mut stbl, file, data)?;
            movie.video = Some(video(&mut stsd, &table, ticks_per_second)?);
        }
        (b"soun", Some((audible, priming))) if movie.audio.is_none() => {
            let table = SampleTable::read(&mut stbl, file, data)?;
            stsd.expect("audio duration", table.ticks, u64::from(duration))?;
            movie.audio = Some(audio(&mut stsd, &table, ticks_per_second, audible, priming)?);
        }
        _ => return Err(trak.error("unknown kind of track")),
    }
    Ok(())
}

fn video(stsd: &mut Cursor<'_>, table: &SampleTable<'_>, ticks_per_second: u32) -> Result<VideoTrack, MediaError> {
    let mut avc1 = stsd.child(b"avc1")?;
    avc1.take(24)?;
    let (width, height) = (avc1.u16()?, avc1.u16()?);
    avc1.take(50)?;
    let mut avcc = avc1.child(b"avcC")?;
    avcc.take(5)?;
    avcc.expect("sets", avcc.clone().u8()?, 0xe1)?;
    avcc.take(1)?;
    let len = avcc.u16()?;
    let sps = avcc.take(len.into())?.to_vec();
    avcc.expect("sets", avcc.clone().u8()?, 1)?;
    avcc.take(1)?;
    let len = avcc.u16()?;
    let pps = avcc.take(len.into())?.to_vec();
    let mut colr = avc1.child(b"colr")?;
    avc1.expect("colour", colr.rest(), b"nclx\0\x01\0\x01\0\x01\0")?;
    avc1.child(b"pasp")?;
    avc1.finish()?;

    let [(_, ticks_per_frame)] = table.runs[..] else {
        return Err(stsd.error("frames of unequal duration"));
    };
    let is_sync = |i: usize| table.sync.as_ref().is_none_or(|sync| sync.binary_search(&(i as u32 + 1)).is_ok());
    Ok(VideoTrack {
        width,
        height,
        fps: Rational::new(ticks_per_second, ticks_per_frame)?,
        sps,
        pps,
        samples: table
            .samples
            .iter()
            .enumerate()
            .map(|(i, data)| VideoSample { data: data.to_vec(), is_sync: is_sync(i) })
            .collect(),
    })
}

fn audio(
    stsd: &mut Cursor<'_>,
    table: &SampleTable<'_>,
    rate_hz: u32,
    audible: u32,
    priming: u32,
) -> Result<AudioTrack, MediaError> {
    let mut mp4a = stsd.child(b"mp4a")?;
    mp4a.take(16)?;
    let channels = mp4a.u16()?;
    mp4a.take(6)?;
    mp4a.expect("rate", mp4a.clone().u32()?, rate_hz << 16)?;
    mp4a.take(4)?;
    let mut esds = mp4a.full(b"esds", 0)?;
    mp4a.finish()?;
    // Descriptors are nested as 3 { 4 { 5 } 6 }; the configuration is the body of 5.
    let mut descriptor = |tag, skip| -> Result<usize, MediaError> {
        esds.expect("descriptor", esds.clone().u8()?, tag)?;
        esds.take(1)?;
        let len = esds.u8()?;
        esds.take(skip)?;
        Ok(len.into())
    };
    descriptor(3, 3)?;
    descriptor(4, 13)?;
    let len = descriptor(5, 0)?;
    let config = esds.take(len)?.to_vec();
    Ok(AudioTrack {
        rate_hz,
        channels,
        config,
        priming,
        samples_per_channel: audible.into(),
        frames: table.samples.iter().map(|data| data.to_vec()).collect(),
    })
}

struct SampleTable<'a> {
    /// Runs of (number of samples, ticks of each).
    runs: Vec<(u32, u32)>,
    ticks: u64,
    /// Numbers, from 1, of samples where decoding can start; `None` means all.
    sync: Option<Vec<u32>>,
    samples: Vec<&'a [u8]>,
}

impl<'a> SampleTable<'a> {
    fn read(stbl: &mut Cursor<'_>, file: &'a [u8], data: Range<usize>) -> Result<Self, MediaError> {
        let (mut runs, mut sync, mut chunks, mut sizes, mut offsets) = (vec![], None, vec![], vec![], vec![]);
        while let Some((name, mut body)) = stbl.next()? {
            body.take(4)?;
            match &name {
                b"stts" => runs = list(&mut body, |c| Ok((c.u32()?, c.u32()?)))?,
                b"stss" => sync = Some(list(&mut body, Cursor::u32)?),
                b"stsc" => chunks = list(&mut body, |c| Ok((c.u32()?, c.u32()?, c.u32()?)))?,
                b"stsz" => {
                    body.take(4)?;
                    sizes = list(&mut body, Cursor::u32)?;
                }
                b"stco" => offsets = list(&mut body, |c| Ok(u64::from(c.u32()?)))?,
                b"co64" => offsets = list(&mut body, Cursor::u64)?,
                b"sgpd" | b"sbgp" => {}
                _ => return Err(body.error("unknown box in `stbl`")),
            }
        }
        let counted: u64 = runs.iter().map(|run| u64::from(run.0)).sum();
        stbl.expect("number of timed samples", counted, sizes.len() as u64)?;
        let ticks = runs.iter().map(|run| u64::from(run.0) * u64::from(run.1)).fold(0, u64::saturating_add);

        let mut samples = Vec::with_capacity(sizes.len());
        let mut runs_of_chunks = chunks.iter().peekable();
        let mut per_chunk = 0;
        for (index, offset) in offsets.iter().enumerate() {
            if let Some((_, len, _)) = runs_of_chunks.next_if(|run| run.0 as usize == index + 1) {
                per_chunk = *len;
            }
            let mut at = usize::try_from(*offset).unwrap_or(usize::MAX);
            for _ in 0..per_chunk {
                let size = *sizes.get(samples.len()).ok_or_else(|| stbl.error("chunks hold too many samples"))?;
                let end = at.checked_add(size as usize).filter(|end| data.start <= at && *end <= data.end);
                let end = end.ok_or_else(|| stbl.error("a sample lies outside of the data"))?;
                samples.push(&file[at..end]);
                at = end;
            }
        }
        stbl.expect("number of samples in chunks", samples.len(), sizes.len())?;
        Ok(Self { runs, ticks, sync, samples })
    }
}

fn tags(udta: &mut Cursor<'_>) -> Result<Vec<(String, String)>, MediaError> {
    let mut meta = udta.full(b"meta", 0)?;
    meta.full(b"hdlr", 0)?;
    let mut ilst = meta.child(b"ilst")?;
    let mut tags = Vec::new();
    while let Some((code, mut item)) = ilst.next()? {
        let name = match KNOWN_TAGS.iter().find(|(_, known)| **known == code) {
            Some((name, _)) => (*name).to_owned(),
            None => {
                item.expect("tag", code, *b"----")?;
                item.full(b"mean", 0)?;
                text(item.full(b"name", 0)?)?
            }
        };
        let mut data = item.full(b"data", 0)?;
        data.take(4)?;
        tags.push((name, text(data)?));
    }
    Ok(tags)
}

fn text(mut body: Cursor<'_>) -> Result<String, MediaError> {
    String::from_utf8(body.rest().to_vec()).map_err(|_| body.error("text is not UTF-8"))
}
