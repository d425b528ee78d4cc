from smt_kernels.stride_write.reference import stride_write as _reference


def stride_write(x, z, conv_state, ssm_state, *, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d,
                 gate=None, backend=None):
    return _reference(x, z, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d, gate)
