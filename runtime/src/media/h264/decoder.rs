//! Decoding streams of many pictures.

use std::collections::VecDeque;

use openh264::OpenH264API;
use openh264::decoder::{DecoderConfig, Flush};

use super::{copy_planes, decoder_error};
use crate::media::{I420, MediaError};

const START_CODE: [u8; 4] = [0, 0, 0, 1];

/// Decodes the pictures of a stream, given in decoding order, and returns them in the order in which they are shown.
pub struct Decoder {
    inner: openh264::decoder::Decoder,
    length_bytes: usize,
    /// What is decoded next; begins with the parameter sets.
    packet: Vec<u8>,
    ready: VecDeque<I420>,
}

impl Decoder {
    /// A decoder of pictures whose NAL units have lengths of `length_bytes` in front.
    ///
    /// # Errors
    /// [`MediaError::Codec`] if the library refuses.
    pub fn new(parameter_sets: &[Vec<u8>], length_bytes: usize) -> Result<Self, MediaError> {
        let config = DecoderConfig::new().flush_after_decode(Flush::NoFlush);
        let inner =
            openh264::decoder::Decoder::with_api_config(OpenH264API::from_source(), config).map_err(decoder_error)?;
        let packet = parameter_sets.iter().flat_map(|set| START_CODE.iter().chain(set)).copied().collect();
        Ok(Self { inner, length_bytes, packet, ready: VecDeque::new() })
    }

    /// Takes the next coded picture. Which pictures are ready then is up to the stream.
    ///
    /// # Errors
    /// [`MediaError::Codec`] if it is damaged.
    pub fn push(&mut self, sample: &[u8]) -> Result<(), MediaError> {
        let mut rest = sample;
        while !rest.is_empty() {
            let (len, tail) =
                rest.split_at_checked(self.length_bytes).ok_or_else(|| decoder_error("a NAL unit is cut"))?;
            let len = len.iter().fold(0, |n, byte| n << 8 | usize::from(*byte));
            let (nal, tail) = tail.split_at_checked(len).ok_or_else(|| decoder_error("a NAL unit is cut"))?;
            self.packet.extend(START_CODE);
            self.packet.extend(nal);
            rest = tail;
        }
        let decoded = self.inner.decode(&self.packet).map_err(decoder_error)?;
        self.ready.extend(decoded.map(|picture| copy_planes(&picture)).transpose()?);
        self.packet.clear();
        Ok(())
    }

    /// Says that no more pictures follow.
    ///
    /// # Errors
    /// [`MediaError::Codec`] if the library fails.
    pub fn finish(&mut self) -> Result<(), MediaError> {
        for picture in self.inner.flush_remaining().map_err(decoder_error)? {
            self.ready.push_back(copy_planes(&picture)?);
        }
        Ok(())
    }

    /// The next picture, if one is ready.
    pub fn take_ready(&mut self) -> Option<I420> {
        self.ready.pop_front()
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("ready", &self.ready.len()).finish_non_exhaustive()
    }
}
