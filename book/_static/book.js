/* From a file the search can't fetch the pages that it found, which is only for their excerpts. */
"use strict";

if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
