//! One way to reach every tensor of a model by name: for loading, training, saving and freezing.

use burn::tensor::{Gradients, Tensor};

use crate::kernels::in_f32;

/// A tensor of the model.
pub enum Parameter<'a> {
    /// A bias or a norm's weight.
    Vector(&'a mut Tensor<1>),
    /// A matrix.
    Matrix(&'a mut Tensor<2>),
    /// A matrix for each expert.
    Cube(&'a mut Tensor<3>),
}

/// Called for each tensor with its full name, in a fixed order.
pub type Visitor<'a> = dyn FnMut(&str, Parameter) + 'a;

impl Parameter<'_> {
    /// The shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Vector(x) => x.dims().to_vec(),
            Self::Matrix(x) => x.dims().to_vec(),
            Self::Cube(x) => x.dims().to_vec(),
        }
    }

    /// Whether it trains.
    pub fn is_trainable(&self) -> bool {
        match self {
            Self::Vector(x) => x.is_require_grad(),
            Self::Matrix(x) => x.is_require_grad(),
            Self::Cube(x) => x.is_require_grad(),
        }
    }

    /// The values in f32 without gradient tracking, in one dimension.
    pub fn flat(&self) -> Tensor<1> {
        match self {
            Self::Vector(x) => flat(x),
            Self::Matrix(x) => flat(x),
            Self::Cube(x) => flat(x),
        }
    }

    /// Replaces the values, keeping the shape and whether it trains.
    pub fn set_flat(&mut self, values: Tensor<1>) {
        let trainable = self.is_trainable();
        match self {
            Self::Vector(x) => replace(x, values, trainable),
            Self::Matrix(x) => replace(x, values, trainable),
            Self::Cube(x) => replace(x, values, trainable),
        }
    }

    /// Replaces the values by what `step` makes of them, in one dimension; keeps shape and whether it trains.
    /// They are the step's own, so that it may change them in place.
    pub fn update(&mut self, step: impl FnOnce(Tensor<1>) -> Tensor<1>) {
        match self {
            Self::Vector(x) => update(x, step),
            Self::Matrix(x) => update(x, step),
            Self::Cube(x) => update(x, step),
        }
    }

    /// Makes it train, in f32, or not.
    pub fn set_trainable(&mut self, trainable: bool) {
        match self {
            Self::Vector(x) => set_trainable(x, trainable),
            Self::Matrix(x) => set_trainable(x, trainable),
            Self::Cube(x) => set_trainable(x, trainable),
        }
    }

    /// Leaves what trains out of graphs from here on, but in the backend that makes them.
    pub fn untrack(&mut self) {
        match self {
            Self::Vector(x) => untrack(x),
            Self::Matrix(x) => untrack(x),
            Self::Cube(x) => untrack(x),
        }
    }

    /// Takes its gradient, in one dimension, out of a backward pass.
    pub fn take_gradient(&self, gradients: &mut Gradients) -> Option<Tensor<1>> {
        match self {
            Self::Vector(x) => take_gradient(x, gradients),
            Self::Matrix(x) => take_gradient(x, gradients),
            Self::Cube(x) => take_gradient(x, gradients),
        }
    }
}

fn one_dimension<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let n = x.shape().num_elements();
    x.reshape([n])
}

fn flat<const D: usize>(x: &Tensor<D>) -> Tensor<1> {
    one_dimension(in_f32(untracked(x.clone())))
}

fn replace<const D: usize>(x: &mut Tensor<D>, values: Tensor<1>, trainable: bool) {
    *x = leaf(values.reshape(x.shape()), trainable);
}

fn update<const D: usize>(x: &mut Tensor<D>, step: impl FnOnce(Tensor<1>) -> Tensor<1>) {
    let (shape, trainable) = (x.shape(), x.is_require_grad());
    let nothing = Tensor::empty([0; D], &x.device());
    let values = one_dimension(in_f32(untracked(std::mem::replace(x, nothing))));
    *x = leaf(step(values).reshape(shape), trainable);
}

fn set_trainable<const D: usize>(x: &mut Tensor<D>, trainable: bool) {
    let values = untracked(x.clone());
    *x = match trainable {
        // Steps are smaller than what 16 bits can tell apart.
        true => leaf(in_f32(values), true),
        false => values,
    };
}

fn untrack<const D: usize>(x: &mut Tensor<D>) {
    *x = untracked(x.clone()).autodiff();
}

fn take_gradient<const D: usize>(x: &Tensor<D>, gradients: &mut Gradients) -> Option<Tensor<1>> {
    x.grad_remove(gradients).map(one_dimension)
}

pub(super) fn untracked<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.is_autodiff() { x.inner() } else { x }
}

fn leaf<const D: usize>(x: Tensor<D>, trainable: bool) -> Tensor<D> {
    if trainable {
        x.autodiff().require_grad()
    } else {
        x
    }
}
