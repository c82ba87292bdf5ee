// The last script: everything is defined, so the page opens.

openMap(0);
