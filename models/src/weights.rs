//! How graph builders ask for weights: every request names key and expected shape, every problem is collected.
//!
//! A [`Weights`] and all views made from it share one list of problems, so that several programs built from one set of
//! files can report what is wrong with all of them.
//!
//! Builders never see files. They see a [`TensorDirectory`], which knows the stored type of every key.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use ltxc_ir::plan::ADAPTER_SLOTS;
use ltxc_ir::{Builder, DType, TensorType, ValueId};

/// Stored types of the tensors of one set of files, by canonical (official) key.
pub trait TensorDirectory {
    /// Type of the tensor `key`, `None` if there is none.
    fn tensor_type(&self, key: &str) -> Option<TensorType>;

    /// Name of the element type of `key`, if there is such a tensor with a type that graphs do not know.
    fn unsupported_type(&self, _key: &str) -> Option<String> {
        None
    }
}

/// Dtypes a builder accepts for a weight or an activation; quantised forms need a recipe of their own.
const ACCEPTED: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// A view of the weights of one component, or of one of several blocks that share a function.
///
/// For such a block, requests are checked under its full prefix, but the emitted weight op has the key without it: the
/// call of the function adds the prefix.
#[derive(Clone)]
pub struct Weights<'a> {
    directory: &'a dyn TensorDirectory,
    source: String,
    /// Full prefix at which every request is checked.
    checked: String,
    /// What is put in front of the key in the emitted op.
    emitted: String,
    /// Rank of the slots for adapters beside linear layers; 0 for none.
    adapter_rank: usize,
    record: Rc<RefCell<Record>>,
}

/// What was asked of one set of files.
#[derive(Default)]
struct Record {
    /// Complete keys.
    asked: BTreeSet<String>,
    problems: Vec<WeightProblem>,
}

/// Something wrong with a set of files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightProblem {
    /// Complete key of the tensor, `None` if the problem is not about a single one.
    pub key: Option<String>,
    /// What was expected and found.
    pub text: String,
}

impl<'a> Weights<'a> {
    /// All weights of the set of files that plans call `source`.
    pub fn new(source: &str, directory: &'a dyn TensorDirectory) -> Weights<'a> {
        Weights {
            directory,
            source: source.into(),
            checked: String::new(),
            emitted: String::new(),
            adapter_rank: 0,
            record: Rc::default(),
        }
    }

    /// The same weights, with slots for low-rank adapters of `rank` altogether beside the linear layers of builders that
    /// have them.
    pub fn with_adapter_slots(&self, rank: usize) -> Weights<'a> {
        Weights { adapter_rank: rank, ..self.clone() }
    }

    /// Rank of the slots for adapters; 0 if there are none.
    pub fn adapter_rank(&self) -> usize {
        self.adapter_rank
    }

    /// The slot `key` for a factor of an adapter, which a run fills.
    pub fn adapter_slot(&self, b: &Builder, key: &str, ty: TensorType) -> ValueId {
        b.weight(ADAPTER_SLOTS, &format!("{}{key}", self.emitted), ty)
    }

    /// The weights below `prefix`.
    pub fn below(&self, prefix: &str) -> Weights<'a> {
        Weights {
            checked: format!("{}{prefix}", self.checked),
            emitted: format!("{}{prefix}", self.emitted),
            ..self.clone()
        }
    }

    /// The weights below `prefix` for a function that is called with [`Weights::call_prefix`] of it.
    pub fn repeated(&self, prefix: &str) -> Weights<'a> {
        Weights { checked: format!("{}{prefix}", self.checked), emitted: String::new(), ..self.clone() }
    }

    /// The prefix a `call` must carry for a function built from [`Weights::repeated`] with `prefix`.
    pub fn call_prefix(&self, prefix: &str) -> String {
        format!("{}{prefix}", self.emitted)
    }

    /// Whether `key` exists.
    pub fn has(&self, key: &str) -> bool {
        self.stored_type(key).is_some()
    }

    /// Stored type of `key`.
    pub fn stored_type(&self, key: &str) -> Option<TensorType> {
        let full = format!("{}{key}", self.checked);
        let found = self.directory.tensor_type(&full);
        self.record.borrow_mut().asked.insert(full);
        found
    }

    /// Stored shape of `key`.
    pub fn shape(&self, key: &str) -> Option<Vec<usize>> {
        self.stored_type(key).map(|ty| ty.shape)
    }

    /// The weight `key`, which must have `shape`. A problem is recorded, and found by [`Weights::finish`].
    pub fn get(&self, b: &Builder, key: &str, shape: &[usize]) -> ValueId {
        let ty = self.check(key, shape);
        b.weight(&self.source, &format!("{}{key}", self.emitted), ty)
    }

    /// The weight `key` if it exists, which must then have `shape`.
    pub fn get_optional(&self, b: &Builder, key: &str, shape: &[usize]) -> Option<ValueId> {
        self.has(key).then(|| self.get(b, key, shape))
    }

    /// The stored type of `key`; an f32 tensor of `shape` if that does not fit.
    fn check(&self, key: &str, shape: &[usize]) -> TensorType {
        let full = format!("{}{key}", self.checked);
        let found = match (self.stored_type(key), self.directory.unsupported_type(&full)) {
            (Some(ty), _) if ty.shape == shape && ACCEPTED.contains(&ty.dtype) => return ty,
            (Some(ty), _) => ty.to_string(),
            (None, Some(dtype)) => dtype,
            (None, None) => "missing".into(),
        };
        let text = format!("`{full}` is {found}, expected {shape:?} in f32, bf16 or f16");
        self.record(WeightProblem { key: Some(full), text });
        TensorType::f32(shape)
    }

    /// Records a problem that is not about a single tensor.
    pub fn problem(&self, text: String) {
        self.record(WeightProblem { key: None, text });
    }

    /// Programs that share weights find the same problems.
    fn record(&self, problem: WeightProblem) {
        let problems = &mut self.record.borrow_mut().problems;
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }

    /// All problems found by this view and the views made from it, in the order in which they were found.
    pub fn problems(&self) -> Vec<WeightProblem> {
        self.record.borrow().problems.clone()
    }

    /// Whether the tensor with the complete key `key` was asked for.
    pub fn was_asked_for(&self, key: &str) -> bool {
        self.record.borrow().asked.contains(key)
    }

    /// Ends a component's requests.
    ///
    /// # Errors
    /// All problems found by this view and the views made from it, up to 20 spelled out.
    pub fn finish(&self) -> Result<(), crate::ModelError> {
        let problems: Vec<String> = self.problems().into_iter().map(|p| p.text).collect();
        if problems.is_empty() {
            return Ok(());
        }
        Err(crate::ModelError::Weights { source_name: self.source.clone(), problems: Listed(problems) })
    }
}

/// Fails unless activations may have the dtype `dtype`.
pub(crate) fn check_compute_dtype(dtype: DType) -> Result<(), crate::ModelError> {
    if ACCEPTED.contains(&dtype) {
        return Ok(());
    }
    Err(crate::ModelError::config("dtype", format!("is {dtype}, activations are f32, bf16 or f16")))
}

/// Problems, printed one per line, 20 at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed(pub Vec<String>);

impl std::fmt::Display for Listed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const MOST: usize = 20;
        for problem in self.0.iter().take(MOST) {
            write!(f, "\n  {problem}")?;
        }
        if self.0.len() > MOST {
            write!(f, "\n  … and {} more", self.0.len() - MOST)?;
        }
        Ok(())
    }
}
