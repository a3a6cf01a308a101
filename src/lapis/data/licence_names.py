"""Licences by family, as SPDX ids, and the other names they go by in packages' metadata."""

from __future__ import annotations

_PERMISSIVE = """
0BSD AFL-2.0 AFL-2.1 AFL-3.0 Apache-1.1 Apache-2.0 Artistic-2.0 BlueOak-1.0.0 BSD-1-Clause BSD-2-Clause
BSD-2-Clause-Patent BSD-3-Clause BSD-3-Clause-Clear BSD-3-Clause-LBNL BSD-4-Clause BSL-1.0 bzip2-1.0.6 CC-BY-1.0
CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0 CNRI-Python curl ECL-2.0 FSFAP FTL HPND ICU IJG ISC JSON Libpng libtiff
MIT MIT-0 MIT-CMU MIT-Modern-Variant MS-PL MulanPSL-2.0 NAIST-2003 NCSA NTP ODC-By-1.0 OFL-1.1 OLDAP-2.8 OpenSSL
PHP-3.01 PostgreSQL PSF-2.0 Python-2.0 Python-2.0.1 Ruby SGI-B-2.0 TCL Unicode-3.0 Unicode-DFS-2016 UPL-1.0 Vim W3C
X11 Xnet Zlib zlib-acknowledgement ZPL-2.0 ZPL-2.1 WordNet-3.0 LicenseRef-BSD LicenseRef-Apache LicenseRef-AFL
"""
_COPYLEFT = """
AGPL-1.0-only AGPL-1.0-or-later AGPL-3.0-only AGPL-3.0-or-later Artistic-1.0 Artistic-1.0-Perl CC-BY-SA-1.0
CC-BY-SA-2.0 CC-BY-SA-2.5 CC-BY-SA-3.0 CC-BY-SA-4.0 CDDL-1.0 CDDL-1.1 CECILL-2.1 CPL-1.0 EPL-1.0 EPL-2.0 EUPL-1.1
EUPL-1.2 GFDL-1.1-only GFDL-1.1-or-later GFDL-1.2-only GFDL-1.2-or-later GFDL-1.3-only GFDL-1.3-or-later
GPL-1.0-only GPL-1.0-or-later GPL-2.0-only GPL-2.0-or-later GPL-3.0-only GPL-3.0-or-later IPL-1.0 LGPL-2.0-only
LGPL-2.0-or-later LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0-only LGPL-3.0-or-later MPL-1.0 MPL-1.1 MPL-2.0
MPL-2.0-no-copyleft-exception MS-RL ODbL-1.0 OSL-3.0 QPL-1.0 Sleepycat SSPL-1.0 LicenseRef-GPL LicenseRef-LGPL
LicenseRef-AGPL LicenseRef-GFDL LicenseRef-MPL
"""
_NON_COMMERCIAL = """
CC-BY-NC-1.0 CC-BY-NC-2.0 CC-BY-NC-2.5 CC-BY-NC-3.0 CC-BY-NC-4.0 CC-BY-NC-ND-1.0 CC-BY-NC-ND-2.0 CC-BY-NC-ND-2.5
CC-BY-NC-ND-3.0 CC-BY-NC-ND-4.0 CC-BY-NC-SA-1.0 CC-BY-NC-SA-2.0 CC-BY-NC-SA-2.5 CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0
PolyForm-Noncommercial-1.0.0 Prosperity-3.0.0 LicenseRef-Free-for-non-commercial-use LicenseRef-Research-only
"""
_PUBLIC_DOMAIN = """
CC0-1.0 CC-PDDC CC-PDM-1.0 PDDL-1.0 SAX-PD Unlicense WTFPL LicenseRef-Public-Domain blessing
"""
_TABLES = (
    ("permissive", _PERMISSIVE),
    ("copyleft", _COPYLEFT),
    ("non-commercial", _NON_COMMERCIAL),
    ("public-domain", _PUBLIC_DOMAIN),
)

FAMILIES = (*(name for name, _ in _TABLES), "unknown")
IDS = {name.lower(): name for _, table in _TABLES for name in table.split()}
"""Every id as SPDX spells it, by its lower-case form: ids are the same in any case."""
FAMILY_OF = {name.lower(): family for family, table in _TABLES for name in table.split()}

# One name a line: SPDX id = other names. Names of which the version is not clear lead to a LicenseRef.
_OTHER_NAMES = """
MIT = mit license | the mit license | the mit license (mit) | mit licence | expat | expat license
MIT-0 = mit no attribution license (mit-0)
HPND = historical permission notice and disclaimer (hpnd)
LicenseRef-BSD = bsd | bsd license | bsd licence | bsd-like | new bsd | bsd-style
BSD-3-Clause = bsd 3-clause | bsd 3-clause license | 3-clause bsd | 3-clause bsd license | bsd-3
BSD-3-Clause = new bsd license | modified bsd license
BSD-2-Clause = bsd 2-clause | bsd 2-clause license | simplified bsd | simplified bsd license | bsd-2
Apache-2.0 = apache 2.0 | apache 2 | apache2 | apache-2 | apache license 2.0 | apache 2.0 license | asl 2.0
Apache-2.0 = apache license, version 2.0 | apache license version 2.0 | apache license v2.0
LicenseRef-Apache = apache | apache software license | apache license
ISC = isc license | isc license (iscl)
PSF-2.0 = python software foundation license | psf | psf license | psfl | python license
Zlib = zlib/libpng license | zlib license
BSL-1.0 = boost software license 1.0 (bsl-1.0) | boost software license | boost
PostgreSQL = postgresql license
UPL-1.0 = universal permissive license (upl)
NCSA = university of illinois/ncsa open source license
WordNet-3.0 = wordnet licence | wordnet license
Artistic-2.0 = artistic license 2.0
LicenseRef-AFL = academic free license (afl)
MPL-1.0 = mozilla public license 1.0 (mpl)
MPL-1.1 = mozilla public license 1.1 (mpl 1.1)
MPL-2.0 = mozilla public license 2.0 (mpl 2.0) | mozilla public license 2.0 | mpl 2.0 | mpl2
LicenseRef-MPL = mpl | mozilla public license
EPL-1.0 = eclipse public license 1.0 (epl-1.0)
EPL-2.0 = eclipse public license 2.0 (epl-2.0)
EUPL-1.1 = european union public licence 1.1 (eupl 1.1)
EUPL-1.2 = european union public licence 1.2 (eupl 1.2)
GPL-2.0-only = gnu general public license v2 (gplv2) | gplv2 | gpl v2 | gpl-2 | gpl-2.0 | gpl 2
GPL-2.0-or-later = gnu general public license v2 or later (gplv2+) | gplv2+ | gpl v2+ | gpl-2+ | gpl-2.0+
GPL-3.0-only = gnu general public license v3 (gplv3) | gplv3 | gpl v3 | gpl-3 | gpl-3.0 | gpl 3
GPL-3.0-or-later = gnu general public license v3 or later (gplv3+) | gplv3+ | gpl v3+ | gpl-3+ | gpl-3.0+
LicenseRef-GPL = gnu general public license (gpl) | gpl | gnu gpl
LGPL-2.0-only = gnu lesser general public license v2 (lgplv2) | lgpl-2.0
LGPL-2.0-or-later = gnu lesser general public license v2 or later (lgplv2+) | lgpl-2.0+
LGPL-2.1-only = lgpl-2.1 | lgplv2.1
LGPL-2.1-or-later = lgpl-2.1+ | lgplv2.1+
LGPL-3.0-only = gnu lesser general public license v3 (lgplv3) | lgplv3 | lgpl-3.0 | lgpl-3
LGPL-3.0-or-later = gnu lesser general public license v3 or later (lgplv3+) | lgplv3+ | lgpl-3.0+ | lgpl-3+
LicenseRef-LGPL = gnu library or lesser general public license (lgpl) | lgpl | gnu lgpl
AGPL-3.0-only = gnu affero general public license v3 | agplv3 | agpl-3.0
AGPL-3.0-or-later = gnu affero general public license v3 or later (agplv3+) | agplv3+ | agpl-3.0+
LicenseRef-AGPL = agpl
LicenseRef-GFDL = gfdl | gnu free documentation license (fdl)
GFDL-1.2-only = gfdl-1.2
GFDL-1.3-only = gfdl-1.3
CC0-1.0 = cc0 | cc0 1.0 universal (cc0 1.0) public domain dedication | cc0 1.0
Unlicense = the unlicense (unlicense) | the unlicense
LicenseRef-Public-Domain = public domain | public-domain | publicdomain
LicenseRef-Free-for-non-commercial-use = free for non-commercial use
LicenseRef-Research-only = research use | research only | non-commercial research
"""

NAMES = {
    other.strip(): line.partition(" = ")[0]
    for line in _OTHER_NAMES.strip().splitlines()
    for other in line.partition(" = ")[2].split(" | ")
}
"""SPDX id (or LicenseRef) by a common name in lower case."""
