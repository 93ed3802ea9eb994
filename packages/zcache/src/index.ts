export const placeholder: string = '@tmem/zcache'
