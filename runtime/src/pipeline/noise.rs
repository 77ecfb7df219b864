//! Where noise comes from: recorded files where they exist, else the generator; what was drawn can be saved.
//!
//! A slot is one tensor of noise. The four slots of a two-stage run have files of their own (load if present, else save,
//! never overwrite), and one file, the bundle, can have all. Everything else is drawn from the stream of its name.
//!
//! Source: spec/pipelines §10.3, §10.4; spec/debug-tools §6.

use std::cell::RefCell;
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
    /// One file for everything else.
    pub bundle: Option<Bundle>,
}

/// A file with all noise of a run, by slot name.
#[derive(Clone, Debug)]
pub struct Bundle {
    path: PathBuf,
    /// What is in the file; `None` if there is none yet.
    known: Option<BTreeMap<String, Stored>>,
    /// What a run has drawn, to be written.
    drawn: RefCell<BTreeMap<String, Stored>>,
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
        if let Some(path) = self.files.get(slot).filter(|path| path.exists() && !self.given.contains_key(slot)) {
            let tensor = noise_files::pick(path, slot)?;
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
        let drawn = || NormalStream::new(self.seed, slot).draw(shape.len());
        let values = match (self.files.get(slot), &self.bundle) {
            (Some(path), _) if path.exists() => values_of(noise_files::pick(path, slot)?, path, shape)?,
            (Some(path), _) => {
                let values = drawn();
                write(path, slot, shape, &values)?;
                values
            }
            (None, Some(Bundle { path, known: Some(known), .. })) => {
                let Some(stored) = known.get(slot) else {
                    return Err(RunError::Input(format!(
                        "noise bundle `{}` has no `{slot}`; give the pipeline, steps and images that it was made with",
                        path.display()
                    )));
                };
                values_of(stored.clone(), path, shape)?
            }
            (None, _) => drawn(),
        };
        if let Some(bundle) = self.bundle.as_ref().filter(|bundle| bundle.known.is_none()) {
            let stored = Stored::f32(slot, &shape.native(), shape.to_native(&values));
            bundle.drawn.borrow_mut().insert(slot.into(), stored);
        }
        Ok(values)
    }
}

impl Bundle {
    /// The bundle at `path`, which is read if it exists and otherwise written by [`Bundle::save`].
    ///
    /// # Errors
    /// A file that is no `.safetensors`, or damaged.
    pub fn open(path: &Path) -> Result<Bundle, RunError> {
        if Container::of(path)? != Container::Safetensors {
            return Err(RunError::Input(format!("noise bundle `{}` must be a .safetensors file", path.display())));
        }
        let known = match path.exists() {
            true => Some(noise_files::read(path)?.into_iter().map(|stored| (stored.name.clone(), stored)).collect()),
            false => None,
        };
        Ok(Bundle { path: path.into(), known, drawn: RefCell::default() })
    }

    /// Writes what a run has drawn, unless the file was there before.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self) -> Result<(), RunError> {
        match self.known {
            Some(_) => Ok(()),
            None => noise_files::write_all(&self.path, self.drawn.borrow().values()),
        }
    }
}

/// The values of noise from the file `path`, in token form.
fn values_of(tensor: Stored, path: &Path, shape: &SlotShape) -> Result<Vec<f32>, RunError> {
    let tokens = [1, shape.tokens(), shape.channels];
    if tensor.shape == shape.native() {
        Ok(shape.to_tokens(&tensor.values))
    } else if tensor.shape == tokens || (shape.channels == 1 && tensor.values.len() == shape.len()) {
        // Noise of steps is a list of values here, whatever its shape was where it comes from.
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
