#!/usr/bin/env bash
# Runs moeport with the variables of CANN, and with the driver that the host lends.
driver=/usr/local/Ascend/driver/lib64
export LD_LIBRARY_PATH="$driver:$driver/common:$driver/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
for folder in /usr/local/Ascend/cann /usr/local/Ascend/ascend-toolkit; do
  if [ -e "$folder/set_env.sh" ]; then
    source "$folder/set_env.sh"
    break
  fi
done
exec moeport "$@"
