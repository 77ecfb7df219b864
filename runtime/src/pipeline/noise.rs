//! Where noise comes from: recorded files where they exist, else the generator; what was drawn can be saved.
//!
//! A slot is one tensor of noise, drawn from the stream of its name. Slots may have files of their own, as the four of a
//! two-stage run have in other tools, and all others a folder in which they are called like their streams. A file is read if
//! it is there, else written, and never overwritten.
//!
//! Source: spec/pipelines §10.3, §10.4; spec/debug-tools §6.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::RunError;
use crate::noise_files::{self, Container, Stored};
use crate::random::NormalStream;

/// Source of all noise of a run.
#[derive(Clone, Debug, Default)]
pub struct Noise {
    /// Seed of everything that is not given.
    pub seed: u64,
    /// Noise given from outside, by slot name (`stage1.video`, `stage1.video.extra`, `stage1.audio` …), in token form.
    pub given: BTreeMap<String, Vec<f32>>,
    /// Files by slot name: read if they exist, else written.
    pub files: BTreeMap<String, PathBuf>,
    /// Folder for the files of all other slots.
    pub folder: Option<PathBuf>,
    /// Whether decoders that add noise to latents decode without it.
    pub spares_decoders: bool,
}

/// Layout of a slot: tokens of `channels` values on a grid of `spatial` extents (`[f, h, w]`, or `[t]` for sound, whose
/// channels split further into `inner` values that are fastest in token form).
#[derive(Clone, Debug)]
pub struct SlotShape {
    /// Extents of the token grid.
    pub spatial: Vec<usize>,
    /// Width of a token.
    pub channels: usize,
    /// Values of a token that lie behind the grid in the native layout: 16 mel bins for sound, 1 for video.
    pub inner: usize,
}

impl SlotShape {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.spatial.iter().product()
    }

    /// Number of values.
    #[allow(clippy::len_without_is_empty)] // a slot without values is no slot
    pub fn len(&self) -> usize {
        self.tokens() * self.channels
    }

    /// The native shape: `(1, c, f, h, w)` or `(1, c, t, mel)`.
    pub fn native(&self) -> Vec<usize> {
        let mut shape = vec![1, self.channels / self.inner];
        shape.extend(&self.spatial);
        if self.inner > 1 {
            shape.push(self.inner);
        }
        shape
    }

    /// Token form from the native layout.
    pub fn to_tokens(&self, native: &[f32]) -> Vec<f32> {
        let (n, outer) = (self.tokens(), self.channels / self.inner);
        let mut out = vec![0.0; native.len()];
        for c in 0..outer {
            for t in 0..n {
                for i in 0..self.inner {
                    out[t * self.channels + c * self.inner + i] = native[(c * n + t) * self.inner + i];
                }
            }
        }
        out
    }

    /// The native layout from token form.
    pub fn to_native(&self, tokens: &[f32]) -> Vec<f32> {
        let (n, outer) = (self.tokens(), self.channels / self.inner);
        let mut out = vec![0.0; tokens.len()];
        for c in 0..outer {
            for t in 0..n {
                for i in 0..self.inner {
                    out[(c * n + t) * self.inner + i] = tokens[t * self.channels + c * self.inner + i];
                }
            }
        }
        out
    }
}

impl Noise {
    /// The noise of a slot and, behind it, of the tokens that conditioning appends, in token form. These have a slot of their
    /// own, so that conditioning does not change the noise of the picture; a file of the slot may have them, too.
    ///
    /// # Errors
    /// As for [`Noise::draw`].
    pub fn draw_all(&self, slot: &str, shape: &SlotShape, appended: usize) -> Result<Vec<f32>, RunError> {
        if appended == 0 {
            return self.draw(slot, shape);
        }
        if let Some(path) = self.file(slot).filter(|path| path.exists() && !self.given.contains_key(slot)) {
            let tensor = noise_files::pick(&path, slot)?;
            if tensor.shape == [1, shape.tokens() + appended, shape.channels] {
                return Ok(tensor.values);
            }
        }
        let own = SlotShape { spatial: vec![appended], channels: shape.channels, inner: 1 };
        let mut noise = self.draw(slot, shape)?;
        noise.extend(self.draw(&format!("{slot}.extra"), &own)?);
        Ok(noise)
    }

    /// The noise of a slot in token form.
    ///
    /// # Errors
    /// Given or recorded noise of another shape, or a file that cannot be read or written.
    pub fn draw(&self, slot: &str, shape: &SlotShape) -> Result<Vec<f32>, RunError> {
        if let Some(values) = self.given.get(slot) {
            if values.len() != shape.len() {
                return Err(RunError::Input(format!(
                    "noise `{slot}` has {} values, this run needs {} ({:?} tokens of {})",
                    values.len(),
                    shape.len(),
                    shape.spatial,
                    shape.channels
                )));
            }
            return Ok(values.clone());
        }
        let Some(path) = self.file(slot) else {
            return Ok(NormalStream::new(self.seed, slot).draw(shape.len()));
        };
        if path.exists() {
            return read(&path, slot, shape);
        }
        let values = NormalStream::new(self.seed, slot).draw(shape.len());
        write(&path, slot, shape, &values)?;
        Ok(values)
    }

    /// The file of a slot, if it has one.
    fn file(&self, slot: &str) -> Option<PathBuf> {
        let named = self.files.get(slot).cloned();
        named.or_else(|| Some(noise_files::in_folder(self.folder.as_deref()?, slot)))
    }
}

/// The noise of a slot from a file, in token form.
fn read(path: &Path, slot: &str, shape: &SlotShape) -> Result<Vec<f32>, RunError> {
    let tensor = noise_files::pick(path, slot)?;
    let tokens = [1, shape.tokens(), shape.channels];
    if tensor.shape == shape.native() {
        Ok(shape.to_tokens(&tensor.values))
    } else if tensor.shape == tokens {
        Ok(tensor.values)
    } else {
        Err(RunError::Input(format!(
            "noise file `{}`: `{}` is {:?}, this run needs {:?} or tokens {tokens:?}",
            path.display(),
            tensor.name,
            tensor.shape,
            shape.native()
        )))
    }
}

fn write(path: &Path, slot: &str, shape: &SlotShape, tokens: &[f32]) -> Result<(), RunError> {
    let key = noise_files::key_for(Container::of(path)?, slot);
    noise_files::write(path, &Stored::f32(key, &shape.native(), shape.to_native(tokens)))
}
