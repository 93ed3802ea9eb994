// A module without a layer.
export const nothing = 1
