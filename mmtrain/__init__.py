"""mmtrain: sparse mixture-of-experts vision-language models, from one laptop to many nodes."""
