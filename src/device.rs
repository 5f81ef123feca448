//! From a device name to a burn device, and values back from one.

use burn::tensor::Tensor;

/// The values of a tensor.
pub fn to_vec(tensor: Tensor<1>) -> Vec<f32> {
    tensor
        .into_data()
        .try_into_vec()
        .expect("tensors are f32")
}

/// The value of a tensor with one element.
pub fn scalar(tensor: Tensor<1>) -> f64 {
    f64::from(to_vec(tensor)[0])
}
