export const placeholder: string = "@tmem/core";
