//! Reading boxes: bounds are checked at every step, and nothing is allocated on the word of a count.

use crate::media::MediaError;

/// A range of the file being read.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
    pub(super) end: usize,
}

impl<'a> Cursor<'a> {
    /// All of `bytes`.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, end: bytes.len() }
    }

    pub(super) fn error(&self, problem: impl ToString) -> MediaError {
        MediaError::Mp4 { problem: problem.to_string(), offset: self.at as u64 }
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], MediaError> {
        if len > self.end - self.at {
            return Err(self.error(format!("{len} bytes expected, {} left", self.end - self.at)));
        }
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], MediaError> {
        Ok(self.take(N)?.try_into().expect("took N bytes"))
    }

    pub(super) fn u8(&mut self) -> Result<u8, MediaError> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, MediaError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, MediaError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, MediaError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        let rest = &self.bytes[self.at..self.end];
        self.at = self.end;
        rest
    }

    pub(super) fn finish(&self) -> Result<(), MediaError> {
        if self.at == self.end { Ok(()) } else { Err(self.error("unexpected bytes")) }
    }

    pub(super) fn expect<T: PartialEq + std::fmt::Debug>(&self, what: &str, got: T, want: T) -> Result<(), MediaError> {
        if got == want { Ok(()) } else { Err(self.error(format!("{what} is {got:?}, {want:?} expected"))) }
    }

    /// The next box, or `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<([u8; 4], Self)>, MediaError> {
        if self.at == self.end {
            return Ok(None);
        }
        let start = self.at;
        let short = self.u32()?;
        let name: [u8; 4] = self.array()?;
        let len = if short == 1 { self.u64()? } else { u64::from(short) };
        let header = self.at - start;
        let body = usize::try_from(len).ok().and_then(|len| len.checked_sub(header));
        let body = body.ok_or_else(|| self.error("impossible box length"))?;
        let at = self.at;
        self.take(body)?;
        Ok(Some((name, Self { bytes: self.bytes, at, end: at + body })))
    }

    /// The next box, which must be `name`.
    pub(super) fn child(&mut self, name: &[u8; 4]) -> Result<Self, MediaError> {
        match self.next()? {
            Some((got, body)) if &got == name => Ok(body),
            _ => Err(self.error(format!("box `{}` expected", name.escape_ascii()))),
        }
    }

    /// The next box, which must be `name` with the given version; positioned after its flags.
    pub(super) fn full(&mut self, name: &[u8; 4], version: u8) -> Result<Self, MediaError> {
        let mut body = self.child(name)?;
        let got = body.u32()?;
        body.expect("version", got >> 24, version.into())?;
        Ok(body)
    }
}

/// A counted list that fills the rest of its box.
pub(super) fn list<'a, T>(
    body: &mut Cursor<'a>,
    entry: impl Fn(&mut Cursor<'a>) -> Result<T, MediaError>,
) -> Result<Vec<T>, MediaError> {
    let entries = counted(body, entry)?;
    body.finish()?;
    Ok(entries)
}

/// A counted list; bytes behind it are of no interest.
pub(super) fn counted<'a, T>(
    body: &mut Cursor<'a>,
    entry: impl Fn(&mut Cursor<'a>) -> Result<T, MediaError>,
) -> Result<Vec<T>, MediaError> {
    let len = body.u32()?;
    // Not reserved ahead: the count is not trusted, the bytes behind it are.
    let mut entries = Vec::new();
    for _ in 0..len {
        entries.push(entry(body)?);
    }
    Ok(entries)
}
