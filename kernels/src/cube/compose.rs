//! Several parts of a fused call as one [`Program`].
//!
//! What a part gives keeps its rounding: a program gives the same bytes as its parts one after the other.

use ltxc_ir::ops::{Binary, RopeLayout};
use ltxc_ir::plan::{Fused, Kernel, Map, MapStep, Part, PartArg, Source};
use ltxc_ir::{DType, TensorType};

use super::index::{Walk, broadcast_strides};
use super::program::{Access, Binding, Operand, Program, Table};
use super::steps::split_scalars;

/// Tensors that a program binds at most: every device binds 30, and kernels have up to five and a few numbers of their own.
/// With several results it binds fewer.
pub(crate) const MAX_BINDINGS: usize = 20;

/// The same with the results of rows, which have no other tensors.
const MAX_BINDINGS_OF_ROWS: usize = 25;

/// A program with what a launch adds to it.
#[derive(Clone, Debug)]
pub(crate) struct Composed {
    pub(crate) program: Program,
    /// What is bound: tensors that are only read, and those that a result may lie on.
    pub(crate) reads: Vec<Source>,
    pub(crate) overlaps: Vec<Source>,
    pub(crate) numbers: Vec<usize>,
    pub(crate) scalars: Vec<f64>,
}

impl Composed {
    /// Tensors that it binds.
    pub(crate) fn bindings(&self) -> usize {
        self.reads.len() + self.overlaps.len()
    }
}

/// Parts that work along rows.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    pub(crate) composed: Composed,
    pub(crate) elements: usize,
    /// Elements of a row, if there are statistics of rows.
    pub(crate) channels: Option<usize>,
    /// Two inputs each: mean and factor.
    pub(crate) norms: Vec<Norm>,
    /// The last input, if there is a rotation.
    pub(crate) rotation: Option<Rotation>,
    /// What is stored: part and register.
    pub(crate) outs: Vec<(usize, usize)>,
}

/// A norm whose operand is a register after some steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Norm {
    pub(crate) steps: usize,
    pub(crate) value: usize,
    pub(crate) is_centred: bool,
    pub(crate) eps: f64,
}

/// A rotation of a register after some steps.
#[derive(Clone, Debug)]
pub(crate) struct Rotation {
    pub(crate) steps: usize,
    pub(crate) value: usize,
    pub(crate) layout: RopeLayout,
    /// Pairs of a head.
    pub(crate) half: usize,
    /// Reads cosine and sine for the number of a pair.
    pub(crate) tables: Program,
}

/// What part `anchor` gives, through `parts`, to the result of part `last`.
///
/// # Errors
/// Why it is no program.
pub(crate) fn tail(
    fused: &Fused,
    anchor: usize,
    parts: &[usize],
    last: usize,
    may_overlap: &[bool],
) -> Result<Composed, String> {
    let mut composer = Composer::new(fused, fused.parts[anchor].result.elements(), 1, may_overlap);
    composer.values[anchor] = Some(0);
    for &part in parts {
        composer.add(part)?;
    }
    let result = composer.raw(last)?;
    let targets = composer.finish(&[result])?;
    Ok(composer.into_composed(targets[0]))
}

/// Parts that run by rows; `outs` of them are stored.
///
/// # Errors
/// Why they are no program.
pub(crate) fn rows(fused: &Fused, parts: &[usize], outs: &[usize], may_overlap: &[bool]) -> Result<Rows, String> {
    let count = |is: fn(&Kernel) -> bool| parts.iter().filter(|&&p| is(&fused.parts[p].kernel)).count();
    let norms = count(|k| matches!(k, Kernel::RmsNorm(_) | Kernel::LayerNorm(_)));
    let rotations = count(|k| matches!(k, Kernel::Rope(_)));
    if rotations > 1 {
        return Err("two rotations".into());
    }
    let elements = fused.parts[*outs.first().ok_or("nothing is stored")?].result.elements();
    let mut composer = Composer::new(fused, elements, 2 * norms + rotations, may_overlap);
    for &part in parts {
        composer.add(part)?;
    }
    let mut wanted = outs.iter().map(|&out| composer.raw(out)).collect::<Result<Vec<u32>, String>>()?;
    wanted.extend(composer.norms.iter().map(|n| n.value as u32));
    wanted.extend(composer.rotation.iter().map(|r| r.value as u32));
    if composer.reads.len() + composer.overlaps.len() + outs.len() > MAX_BINDINGS_OF_ROWS {
        return Err(format!("more than {MAX_BINDINGS_OF_ROWS} tensors"));
    }
    let registers = composer.finish(&wanted)?;
    let (stored, others) = registers.split_at(outs.len());
    let mut norms = std::mem::take(&mut composer.norms);
    norms.iter_mut().zip(others).for_each(|(norm, &register)| norm.value = register);
    let mut rotation = composer.rotation.take();
    if let (Some(rotation), Some(&register)) = (&mut rotation, others.last()) {
        rotation.value = register;
        rotation.tables.spaces = composer.table_spaces.clone();
    }
    let channels = composer.channels;
    let outs = outs.iter().copied().zip(stored.iter().copied()).collect();
    Ok(Rows { composed: composer.into_composed(0), elements, channels, norms, rotation, outs })
}

/// Registers are numbered as if there were none before: inputs from 0, operands and steps from these.
const OPERANDS: u32 = 1 << 16;
const STEPS: u32 = 1 << 24;

struct Composer<'a> {
    fused: &'a Fused,
    elements: usize,
    inputs: usize,
    /// For each operand of the call, whether a result may lie on it.
    may_overlap: &'a [bool],
    operands: Vec<Operand>,
    spaces: Vec<(usize, usize)>,
    table_spaces: Vec<(usize, usize)>,
    numbers: Vec<usize>,
    reads: Vec<Source>,
    overlaps: Vec<Source>,
    steps: Vec<MapStep>,
    /// What each part gives, as computed, and rounded to its dtype.
    values: Vec<Option<u32>>,
    rounded: Vec<Option<u32>>,
    is_member: Vec<bool>,
    channels: Option<usize>,
    norms: Vec<Norm>,
    rotation: Option<Rotation>,
}

impl<'a> Composer<'a> {
    fn new(fused: &'a Fused, elements: usize, inputs: usize, may_overlap: &'a [bool]) -> Composer<'a> {
        let n = fused.parts.len();
        Composer {
            fused,
            elements,
            inputs,
            may_overlap,
            operands: Vec::new(),
            spaces: Vec::new(),
            table_spaces: Vec::new(),
            numbers: Vec::new(),
            reads: Vec::new(),
            overlaps: Vec::new(),
            steps: Vec::new(),
            values: vec![None; n],
            rounded: vec![None; n],
            is_member: vec![false; n],
            channels: None,
            norms: Vec::new(),
            rotation: None,
        }
    }

    fn add(&mut self, index: usize) -> Result<(), String> {
        let part = &self.fused.parts[index];
        self.is_member[index] = true;
        if !matches!(part.kernel, Kernel::Gather(_)) && part.result.elements() != self.elements {
            return Err(format!("part {index} has another number of elements"));
        }
        let value = match &part.kernel {
            // Rows are read from the table by whoever uses them.
            Kernel::Gather(_) => return Ok(()),
            Kernel::Map(map) => self.add_map(map, part)?,
            Kernel::RmsNorm(op) => self.add_norm(part, false, op.eps.0)?,
            Kernel::LayerNorm(op) => self.add_norm(part, true, op.eps.0)?,
            Kernel::Rope(op) => self.add_rotation(part, op.layout)?,
            kernel => return Err(format!("`{}` is no function of elements of a row", kernel.name())),
        };
        self.values[index] = Some(value);
        Ok(())
    }

    fn add_map(&mut self, map: &Map, part: &Part) -> Result<u32, String> {
        let types: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
        if !Map::is_float(&types, &part.result) {
            return Err("a map of integers".into());
        }
        let mut registers = Vec::with_capacity(types.len() + map.steps.len());
        for arg in &part.args {
            registers.push(self.read(arg, &part.result.shape)?);
        }
        for step in &map.steps {
            let step = renumbered(*step, |r| registers[r as usize]);
            registers.push(self.push(step));
        }
        registers.last().copied().ok_or_else(|| "a map of nothing".into())
    }

    fn add_norm(&mut self, part: &Part, is_centred: bool, eps: f64) -> Result<u32, String> {
        let channels = part.result.shape.last().copied().unwrap_or(1);
        if self.channels.is_some_and(|c| c != channels) || self.rotation.is_some() {
            return Err("norms of different rows".into());
        }
        self.channels = Some(channels);
        let x = self.read(&part.args[0], &part.result.shape)?;
        let input = 2 * self.norms.len() as u32;
        self.norms.push(Norm { steps: self.steps.len(), value: x as usize, is_centred, eps });
        let centred = if is_centred { self.push(MapStep::Binary(Binary::Sub, x, input)) } else { x };
        let mut value = self.push(MapStep::Binary(Binary::Mul, centred, input + 1));
        for (arg, op) in part.args[1..].iter().zip([Binary::Mul, Binary::Add]) {
            let parameter = self.read(arg, &part.result.shape)?;
            value = self.push(MapStep::Binary(op, value, parameter));
        }
        Ok(value)
    }

    fn add_rotation(&mut self, part: &Part, layout: RopeLayout) -> Result<u32, String> {
        let x = self.read(&part.args[0], &part.result.shape)?;
        let mut shape = part.result.shape.clone();
        let last = shape.last_mut().ok_or("a rotation of no axes")?;
        *last /= 2;
        let half = *last;
        // Tables have positions of their own: pairs.
        let spaces = std::mem::take(&mut self.spaces);
        let operands = std::mem::take(&mut self.operands);
        let loaded = part.args[1..].iter().try_for_each(|arg| self.load(arg, &shape).map(|_| ()));
        self.table_spaces = std::mem::replace(&mut self.spaces, spaces);
        let tables = std::mem::replace(&mut self.operands, operands);
        loaded?;
        let (cos, sin) = match tables[..] {
            [cos, sin] => (cos, sin),
            // The same table twice is read twice.
            [both] => (both, both),
            _ => return Err("a rotation without tables".into()),
        };
        let tables = Program { inputs: 0, operands: vec![cos, sin], spaces: Vec::new(), steps: Vec::new(), result: 0 };
        self.rotation = Some(Rotation { steps: self.steps.len(), value: x as usize, layout, half, tables });
        Ok(self.inputs as u32 - 1)
    }

    fn push(&mut self, step: MapStep) -> u32 {
        self.steps.push(step);
        STEPS + self.steps.len() as u32 - 1
    }

    /// The value of an operand of a part whose result has this shape.
    fn read(&mut self, arg: &PartArg, shape: &[usize]) -> Result<u32, String> {
        let Source::Part(s) = arg.source else { return self.load(arg, shape) };
        let s = s as usize;
        if self.values[s].is_none() {
            return self.load(arg, shape);
        }
        if arg.ty.elements() != self.elements {
            return Err(format!("part {s} is broadcast"));
        }
        if let Some(register) = self.rounded[s] {
            return Ok(register);
        }
        let value = self.raw(s)?;
        let dtype = self.fused.parts[s].result.dtype;
        let register = if dtype == DType::F32 { value } else { self.push(MapStep::Round(dtype, value)) };
        self.rounded[s] = Some(register);
        Ok(register)
    }

    /// What a part gives, before it is rounded to its dtype.
    fn raw(&mut self, part: usize) -> Result<u32, String> {
        if let Some(value) = self.values[part] {
            return Ok(value);
        }
        let ty = self.fused.parts[part].result.clone();
        if ty.elements() != self.elements {
            return Err(format!("part {part} has another number of elements"));
        }
        self.load(&PartArg { source: Source::Part(part as u32), ty: ty.clone() }, &ty.shape)
    }

    /// An operand that is read from memory, possibly rows of a table.
    fn load(&mut self, arg: &PartArg, shape: &[usize]) -> Result<u32, String> {
        let gather = match arg.source {
            Source::Part(s) if self.is_member[s as usize] => Some(&self.fused.parts[s as usize]),
            _ => None,
        };
        let (source, table) = match gather {
            None => (arg.source, None),
            Some(Part { kernel: Kernel::Gather(op), args, result }) => {
                let outside = |a: &PartArg| match a.source {
                    Source::Part(s) => !self.is_member[s as usize],
                    Source::Operand(_) => true,
                };
                let [values, rows] = &args[..] else { return Err("a malformed gather".into()) };
                if !outside(values) || !outside(rows) {
                    return Err("a table that is computed here".into());
                }
                let inner = values.ty.shape[op.axis + 1..].iter().product();
                let first = self.number(&[values.ty.shape[op.axis], result.shape[op.axis], inner]);
                (values.source, Some(Table { rows: self.bind(rows.source)?, first }))
            }
            Some(part) => return Err(format!("`{}` is not known yet", part.kernel.name())),
        };
        let binding = self.bind(source)?;
        let walk = Walk::new(shape, &[broadcast_strides(&arg.ty.shape, shape)]);
        let access = if walk.is_constant(0) {
            Access::Constant
        } else if walk.is_flat(0) {
            Access::Flat
        } else {
            let (start, rank) = self.space(&walk.extents);
            Access::Strided(start, rank, self.number(&walk.strides[0]))
        };
        let operand = Operand { dtype: arg.ty.dtype, binding, access, table };
        let known = self.operands.iter().position(|o| *o == operand);
        let index = known.unwrap_or_else(|| {
            self.operands.push(operand);
            self.operands.len() - 1
        });
        Ok(OPERANDS + index as u32)
    }

    /// Where some numbers stand; equal ones stand there once.
    fn number(&mut self, numbers: &[usize]) -> usize {
        let known = self.numbers.windows(numbers.len()).position(|window| window == numbers);
        known.unwrap_or_else(|| {
            self.numbers.extend(numbers);
            self.numbers.len() - numbers.len()
        })
    }

    /// The first coordinate of a space, and how many there are.
    fn space(&mut self, extents: &[usize]) -> (usize, usize) {
        let space = (self.number(extents), extents.len());
        let at = self.spaces.iter().position(|s| *s == space).unwrap_or_else(|| {
            self.spaces.push(space);
            self.spaces.len() - 1
        });
        (self.spaces[..at].iter().map(|s| s.1).sum(), extents.len())
    }

    fn bind(&mut self, source: Source) -> Result<Binding, String> {
        if self.reads.len() + self.overlaps.len() >= MAX_BINDINGS {
            return Err(format!("more than {MAX_BINDINGS} operands"));
        }
        let may_overlap = matches!(source, Source::Operand(a) if self.may_overlap[a as usize]);
        let list = if may_overlap { &mut self.overlaps } else { &mut self.reads };
        let index = list.iter().position(|s| *s == source).unwrap_or_else(|| {
            list.push(source);
            list.len() - 1
        });
        Ok(Binding { index, may_overlap })
    }

    /// Gives all registers their final numbers, and those of `wanted`.
    fn finish(&mut self, wanted: &[u32]) -> Result<Vec<usize>, String> {
        let (inputs, operands) = (self.inputs as u32, self.operands.len() as u32);
        let number = |r: u32| match r {
            STEPS.. => inputs + operands + (r - STEPS),
            OPERANDS.. => inputs + (r - OPERANDS),
            _ => r,
        };
        self.steps.iter_mut().for_each(|step| *step = renumbered(*step, number));
        Ok(wanted.iter().map(|&r| number(r) as usize).collect())
    }

    fn into_composed(self, result: usize) -> Composed {
        let (steps, scalars) = split_scalars(&self.steps);
        let program = Program { inputs: self.inputs, operands: self.operands, spaces: self.spaces, steps, result };
        Composed { program, reads: self.reads, overlaps: self.overlaps, numbers: self.numbers, scalars }
    }
}

/// A step whose registers have other numbers.
fn renumbered(step: MapStep, number: impl Fn(u32) -> u32) -> MapStep {
    match step {
        MapStep::Scalar(v) => MapStep::Scalar(v),
        MapStep::Unary(op, a) => MapStep::Unary(op, number(a)),
        MapStep::Binary(op, a, b) => MapStep::Binary(op, number(a), number(b)),
        MapStep::Compare(op, a, b) => MapStep::Compare(op, number(a), number(b)),
        MapStep::Select(a, b, c) => MapStep::Select(number(a), number(b), number(c)),
        MapStep::Function(f, a) => MapStep::Function(f, number(a)),
        MapStep::Snake(a, b, c) => MapStep::Snake(number(a), number(b), number(c)),
        MapStep::Round(dtype, a) => MapStep::Round(dtype, number(a)),
    }
}
