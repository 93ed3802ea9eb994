export const placeholder: string = '@tmem/conformance'
