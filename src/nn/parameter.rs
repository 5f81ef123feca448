//! One way to reach every tensor of a model by name: for loading, training, saving and freezing.

use burn::tensor::{Gradients, Tensor};

/// A tensor of the model.
pub enum Parameter<'a> {
    /// A bias or a norm's weight.
    Vector(&'a mut Tensor<1>),
    /// A matrix.
    Matrix(&'a mut Tensor<2>),
}

/// Called for each tensor with its full name, in a fixed order.
pub type Visitor<'a> = dyn FnMut(&str, Parameter) + 'a;

impl Parameter<'_> {
    /// The shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Vector(x) => x.dims().to_vec(),
            Self::Matrix(x) => x.dims().to_vec(),
        }
    }

    /// Whether it trains.
    pub fn is_trainable(&self) -> bool {
        match self {
            Self::Vector(x) => x.is_require_grad(),
            Self::Matrix(x) => x.is_require_grad(),
        }
    }

    /// The values without gradient tracking, in one dimension.
    pub fn flat(&self) -> Tensor<1> {
        match self {
            Self::Vector(x) => untracked((*x).clone()),
            Self::Matrix(x) => {
                let x = untracked((*x).clone());
                let n = x.shape().num_elements();
                x.reshape([n])
            }
        }
    }

    /// Replaces the values, keeping the shape and whether it trains.
    pub fn set_flat(&mut self, values: Tensor<1>) {
        let trainable = self.is_trainable();
        match self {
            Self::Vector(x) => **x = leaf(values, trainable),
            Self::Matrix(x) => {
                let shape = x.dims();
                **x = leaf(values.reshape(shape), trainable);
            }
        }
    }

    /// Makes it train or not.
    pub fn set_trainable(&mut self, trainable: bool) {
        match self {
            Self::Vector(x) => **x = leaf(untracked((*x).clone()), trainable),
            Self::Matrix(x) => **x = leaf(untracked((*x).clone()), trainable),
        }
    }

    /// Takes its gradient, in one dimension, out of a backward pass.
    pub fn take_gradient(&self, gradients: &mut Gradients) -> Option<Tensor<1>> {
        match self {
            Self::Vector(x) => x.grad_remove(gradients),
            Self::Matrix(x) => {
                let gradient = x.grad_remove(gradients)?;
                let n = gradient.shape().num_elements();
                Some(gradient.reshape([n]))
            }
        }
    }
}

fn untracked<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.is_autodiff() { x.inner() } else { x }
}

fn leaf<const D: usize>(x: Tensor<D>, trainable: bool) -> Tensor<D> {
    if trainable {
        x.autodiff().require_grad()
    } else {
        x
    }
}
